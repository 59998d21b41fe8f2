"""An entry of the log that several Checkpoint servers share: some changes, and who made them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from tinsmithd.checkpoint.catalogue.rows import Change
from tinsmithd.checkpoint.store import RETRY_UNAVAILABLE_S
from tinsmithd.errors import DataLoss, Reason, Unavailable

FORMAT = 1
"""Rises where an older server would misread an entry; it stops then."""
DIGEST_CHARACTERS = 64


@dataclass(frozen=True)
class Entry:
    """What one process changed at once.

    Attributes:
        replica: Which process.
        nonce: Tells this entry from one with the same changes.
        changes: What it changed, in order.
    """

    replica: str
    nonce: str
    changes: Sequence[Change]

    def encode(self) -> bytes:
        """The entry as the log has it: the digest of the rest, then JSON."""
        document = {
            "format": FORMAT,
            "replica": self.replica,
            "nonce": self.nonce,
            "changes": self.changes,
        }
        body = json.dumps(document, separators=(",", ":")).encode()
        return _digest(body) + b"\n" + body


def digest_in(data: bytes) -> str:
    """The digest that an entry begins with, which no other entry has."""
    return data[:DIGEST_CHARACTERS].decode("ascii", "replace")


def decode(data: bytes, position: int) -> Entry:
    """Read an entry.

    Raises:
        DataLoss: It is not what was written (CHECKPOINT_CORRUPT).
        Unavailable: A later version wrote it (CHECKPOINT_UNAVAILABLE).
    """
    digest, body = data[:DIGEST_CHARACTERS], data[DIGEST_CHARACTERS + 1 :]
    if digest != _digest(body):
        message = f"entry {position} of the store's log is damaged"
        raise DataLoss(message, Reason.CHECKPOINT_CORRUPT)
    document = json.loads(body)
    if document["format"] > FORMAT:
        message = f"entry {position} of the store's log has format {document['format']}, this"
        message += f" server knows {FORMAT}: a later version wrote it"
        raise Unavailable(message, Reason.CHECKPOINT_UNAVAILABLE, retry_after_s=RETRY_UNAVAILABLE_S)
    return Entry(document["replica"], document["nonce"], document["changes"])


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode()
