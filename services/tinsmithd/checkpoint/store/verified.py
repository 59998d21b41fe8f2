"""Reading what was written, and nothing else."""

import hashlib
from collections.abc import Iterable, Iterator

from tinsmithd.checkpoint.store.interface import Blob
from tinsmithd.errors import DataLoss, Reason


def verified(blob: Blob, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The bytes of a blob; only a normal end means that they are what was written.

    Raises:
        DataLoss: They are not (CHECKPOINT_CORRUPT).
    """
    digest, size = hashlib.sha256(), 0
    for data in pieces:
        digest.update(data)
        size += len(data)
        if size > blob.size_bytes:
            raise corrupt(blob, "is longer than it was")
        yield data
    if size != blob.size_bytes or digest.hexdigest() != blob.sha256:
        raise corrupt(blob, "is not what was written")


def corrupt(blob: Blob, what: str) -> DataLoss:
    """The error that says what is wrong with a blob."""
    message = f"{blob.name} (sha256 {blob.sha256[:12]}…) {what}"
    return DataLoss(message, Reason.CHECKPOINT_CORRUPT)
