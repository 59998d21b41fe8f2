"""What the catalogue says of checkpoints that are there, are not, or are damaged."""

import contextlib
import logging
from collections.abc import Iterator

from tinsmithd.checkpoint.catalogue.record import Checkpoint
from tinsmithd.domain import CheckpointPath, is_ephemeral_name
from tinsmithd.errors import AlreadyExists, DataLoss, NotFound, Reason, quota_exceeded

QUOTA_RETRY_S = 60.0
"""When an owner who has stored all that he may can look again."""

_log = logging.getLogger(__name__)


def check_repeat(found: Checkpoint, request_id: str, request_digest: str) -> None:
    """Refuse to make a checkpoint again, unless the request is the one that made it.

    Raises:
        AlreadyExists: It is another (CHECKPOINT_EXISTS, REQUEST_ID_CONFLICT).
    """
    if not request_id or request_id != found.request_id:
        message = f"{found.path} exists; save under another name, or overwrite it"
        raise AlreadyExists(message, Reason.CHECKPOINT_EXISTS)
    if request_digest != found.request_digest:
        message = f"{found.path} was made by a request of this id, which had other content"
        raise AlreadyExists(message, Reason.REQUEST_ID_CONFLICT)


def check_stored(stored_bytes: int, stored_max: int) -> None:
    """Refuse that an owner has so many bytes.

    Args:
        stored_bytes: How many they would be.
        stored_max: How many they may be; 0: any number.

    Raises:
        ResourceExhausted: They are too many (QUOTA_EXCEEDED).
    """
    if stored_max and stored_bytes > stored_max:
        raise quota_exceeded("tenant_stored_bytes_max", stored_max, stored_bytes, QUOTA_RETRY_S)


def not_found(path: CheckpointPath) -> NotFound:
    """The error that says that there is no such checkpoint."""
    message = f"no checkpoint {path}"
    if is_ephemeral_name(path.name):
        message += (
            "; sampler weights without a name are reclaimed when no client holds them and their "
            "model has newer ones or is deleted: save them again, or under a name"
        )
    return NotFound(message, Reason.CHECKPOINT_NOT_FOUND)


@contextlib.contextmanager
def logged() -> Iterator[None]:
    """Log what is damaged and go on without it."""
    try:
        yield
    except DataLoss as error:
        log(error)


def log(error: DataLoss) -> None:
    """Log what is damaged."""
    _log.error("%s", error)


def rows_missing(seen: int, expected: int) -> DataLoss:
    """The error of rows that vanished."""
    message = f"the catalogue has {seen} checkpoints where it says that it has {expected}"
    error = DataLoss(message, Reason.CHECKPOINT_CORRUPT)
    error.logged = message
    return error
