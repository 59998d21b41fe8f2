"""What is known of a checkpoint, and how a row of the catalogue holds it."""

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tinsmithd import tunings
from tinsmithd.checkpoint.catalogue import schema
from tinsmithd.checkpoint.store import Blob
from tinsmithd.domain import CheckpointKind, CheckpointPath, FullConfig, Tuning
from tinsmithd.errors import DataLoss, Reason

_KINDS: Mapping[str, CheckpointKind] = {kind.value: kind for kind in CheckpointKind}


@dataclass(frozen=True)
class Ephemeral:
    """What is known of a checkpoint because it lives as long as somebody uses it.

    Attributes:
        ttl_seconds: How long it may be unused; None: for ever.
        writer: Who wrote it, see `Writer`; empty: nobody says when its model is gone.
    """

    ttl_seconds: int | None = None
    writer: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """What is known of a checkpoint; `expire_time_s` None means never."""

    path: CheckpointPath
    base_model: str
    tuning: Tuning
    step_count: int
    create_time_s: float
    expire_time_s: float | None
    user_metadata: Mapping[str, str]
    files: Sequence[Blob]
    request_id: str = ""
    """Id of the request that made it; empty where a repeat is not to be recognised."""
    request_digest: str = ""
    """Digest of that request."""
    number: int = 0
    """Rises with every commit; orders pages."""
    ephemeral: Ephemeral | None = None
    """None for an ordinary one."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all its files."""
        return sum(blob.size_bytes for blob in self.files)


def intact(row: Iterable[Any]) -> bool:
    """Whether a row is what was written: its digest says so."""
    *columns, digest = tuple(row)
    try:
        return bool(schema.digest_of(*columns) == digest)
    except TypeError:
        return False


def read(row: Iterable[Any], subject: str = "") -> Checkpoint:
    """The checkpoint of a row, all columns of it in order.

    Raises:
        DataLoss: It is not what was written (CHECKPOINT_CORRUPT).
    """
    number, model_id, kind, name, expire_time_s, text, _ = row
    try:
        if not intact(row):
            raise ValueError("the digest differs")
        record = json.loads(text)
        return Checkpoint(
            path=CheckpointPath(model_id, _KINDS[kind], name),
            base_model=record["base_model"],
            tuning=_tuning(record),
            step_count=record["step_count"],
            create_time_s=record["create_time_s"],
            expire_time_s=expire_time_s,
            user_metadata=record["user_metadata"],
            ephemeral=_ephemeral(record),
            files=[Blob(*file) for file in record["files"]],
            # Those of older releases have none.
            request_id=record.get("request_id", ""),
            request_digest=record.get("request_digest", ""),
            number=number,
        )
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(row, error, subject) from error


def _damaged(row: Iterable[Any], error: Exception, subject: str = "") -> DataLoss:
    number, model_id, kind, name, *_ = row
    subject = subject or f"{model_id!r} {kind!r} {name!r}"
    message = f"{subject}: entry {number} of the catalogue is damaged: {error}"
    return DataLoss(message, Reason.CHECKPOINT_CORRUPT)


def text_of(checkpoint: Checkpoint) -> str:
    """The column `record`."""
    ephemeral = checkpoint.ephemeral
    return json.dumps(
        {
            "base_model": checkpoint.base_model,
            **checkpoint.tuning.to_document(),
            "step_count": checkpoint.step_count,
            "create_time_s": checkpoint.create_time_s,
            "user_metadata": dict(checkpoint.user_metadata),
            # Absent, as in records of earlier versions, where it is an ordinary one.
            **({} if ephemeral is None else {"ephemeral": asdict(ephemeral)}),
            "files": [_file(blob) for blob in checkpoint.files],
            "request_id": checkpoint.request_id,
            "request_digest": checkpoint.request_digest,
        }
    )


def _file(blob: Blob) -> list[object]:
    return [blob.name, blob.size_bytes, blob.sha256, *([blob.key] if blob.key else [])]


def _tuning(record: Mapping[str, Any]) -> Tuning:
    # Records of earlier versions say of a model without an adapter that its `lora` is null.
    return FullConfig() if record.get("lora", ...) is None else tunings.from_document(record)


def _ephemeral(record: Mapping[str, Any]) -> Ephemeral | None:
    found = record.get("ephemeral")
    return None if found is None else Ephemeral(**found)


def places_of(row: sqlite3.Row) -> Sequence[str]:
    """Where the files of a row's checkpoint are, see `Blob.place`.

    Raises:
        DataLoss: It is not what was written (CHECKPOINT_CORRUPT).
    """
    try:
        if not intact(row):
            raise ValueError("the digest differs")
        return [file[-1] for file in json.loads(row["record"])["files"]]
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise _damaged(row, error) from error
