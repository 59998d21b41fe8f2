"""What a failing catalogue is called: errors of its disk and of SQLite in this project's words.

no space, no quota, file too large   ResourceExhausted (STORAGE_FULL)
read-only, no permission, I/O error  Unavailable (CHECKPOINT_UNAVAILABLE)
SQLite's file is not what it wrote   DataLoss (CHECKPOINT_CORRUPT)
"""

import contextlib
import sqlite3
from collections.abc import Iterator

from tinsmithd.checkpoint.store import (
    RETRY_FULL_S,
    RETRY_UNAVAILABLE_S,
    storage_errors,
)
from tinsmithd.errors import DataLoss, Reason, ResourceExhausted, TinsmithError, Unavailable

_PASSING = (
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_INTERRUPT,
)


@contextlib.contextmanager
def catalogue_errors(subject: str = "the catalogue") -> Iterator[None]:
    """Translate what disk and SQLite raise.

    Args:
        subject: What is lost where the catalogue turns out to be damaged, such as a path.

    Raises:
        ResourceExhausted, Unavailable, DataLoss: See the table above.
    """
    try:
        with storage_errors():
            yield
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", None) is None:
            raise  # not from the file: a mistake of ours, such as a closed connection
        raise of_sqlite(error, subject) from error


def of_sqlite(error: sqlite3.DatabaseError, subject: str) -> TinsmithError:
    """The error that says what SQLite met. Our statements are right, so others mean damage."""
    code = error.sqlite_errorcode & 0xFF  # without what extends it
    if code == sqlite3.SQLITE_FULL:
        message = "no space is left for the catalogue of checkpoints"
        return ResourceExhausted(message, Reason.STORAGE_FULL, retry_after_s=RETRY_FULL_S)
    if code in _PASSING:
        message = f"the catalogue of checkpoints fails: {error}"
        return Unavailable(
            message, Reason.CHECKPOINT_UNAVAILABLE, retry_after_s=RETRY_UNAVAILABLE_S
        )
    message = f"{subject}: the catalogue of checkpoints is damaged ({error})"
    return DataLoss(message, Reason.CHECKPOINT_CORRUPT)
