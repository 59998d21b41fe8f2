"""What a failing disk is called in this project's words.

    no space, no quota, file too large   ResourceExhausted (STORAGE_FULL)
    read-only, no permission, I/O error  Unavailable (CHECKPOINT_UNAVAILABLE)

Each says that nothing was done: what was there is as it was, and nothing of the new is left.
"""

import contextlib
import errno
from collections.abc import Iterator

from tinsmithd.errors import Reason, ResourceExhausted, TinsmithError, Unavailable

RETRY_FULL_S = 30.0
RETRY_UNAVAILABLE_S = 5.0


@contextlib.contextmanager
def storage_errors() -> Iterator[None]:
    """Translate what a disk raises.

    Raises:
        ResourceExhausted, Unavailable: See the table above.
    """
    try:
        yield
    except OSError as error:
        raise of_disk(error) from error


def whole(error: TinsmithError) -> str:
    """What an error says to who operates the server: more than to callers."""
    return ": ".join([error.message, *getattr(error, "__notes__", ())])


def of_disk(error: OSError) -> TinsmithError:
    """The error that says what an OSError means for checkpoints."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        message = "no space is left for checkpoints"
        return ResourceExhausted(message, Reason.STORAGE_FULL, retry_after_s=RETRY_FULL_S)
    if error.errno == errno.EFBIG:
        # A limit on the size of one file: waiting does not help.
        message = "a file of this size cannot be stored"
        return ResourceExhausted(message, Reason.STORAGE_FULL)
    message = f"the storage of checkpoints fails: {error.strerror or type(error).__name__}"
    return Unavailable(message, Reason.CHECKPOINT_UNAVAILABLE, retry_after_s=RETRY_UNAVAILABLE_S)
