"""Who may write: of one name only the writer of the highest epoch that was seen.

What is kept of it is the table `writers` of the catalogue.
"""

import sqlite3
from dataclasses import dataclass, field

from tinsmithd.checkpoint.catalogue.record import intact
from tinsmithd.checkpoint.catalogue.rows import Rows
from tinsmithd.errors import DataLoss, FailedPrecondition, Reason, over_limit

EPOCH_STEP_MAX = 1_000_000
"""See `CheckpointConfig.writer_epoch_step_max`."""


@dataclass(frozen=True)
class Writer:
    """Who writes, where one may be replaced by another: of one name only the highest epoch may.

    Attributes:
        name: What all that replace each other have.
        epoch: Rises with each replacement.
        where: Stands before `writer_epoch` in errors.
    """

    name: str
    epoch: int
    where: str = field(default="header.", compare=False)


def admit(rows: Rows, writer: Writer, step_max: int) -> None:
    """Keep a writer's epoch as the highest, in the transaction that is open.

    Raises:
        FailedPrecondition, DataLoss: See `highest_epoch`.
        InvalidArgument: It is more than `step_max` above the highest that was seen.
    """
    highest = highest_epoch(rows.db, writer)
    step = writer.epoch - (highest or 0)
    if step > step_max:
        # An epoch is one restart. A number that no restarts explain would fence off, for ever,
        # everybody who counts them.
        raise over_limit(f"{writer.where}writer_epoch", "writer_epoch_step_max", step, step_max)
    if highest is None or highest < writer.epoch:
        rows.write_writer(writer.name, writer.epoch)


def highest_epoch(db: sqlite3.Connection, writer: Writer) -> int | None:
    """The highest epoch of this writer that was seen; None where there is none.

    Messages do not name it: its name is all that the fence asks for, and callers read them.

    Raises:
        FailedPrecondition: It was replaced by one of a higher epoch (STALE_EPOCH).
        DataLoss: Nobody knows any more whether it was (CHECKPOINT_CORRUPT).
    """
    row = db.execute("SELECT * FROM writers WHERE name=?", (writer.name,)).fetchone()
    if row is None:
        return None
    if not intact(row):
        message = "the epoch of this writer is damaged"
        raise DataLoss(message, Reason.CHECKPOINT_CORRUPT)
    highest: int = row["epoch"]
    if writer.epoch < highest:
        message = f"the writer of epoch {writer.epoch} was replaced by that of {highest}"
        metadata = {"epoch": str(writer.epoch), "highest_epoch": str(highest)}
        raise FailedPrecondition(message, Reason.STALE_EPOCH, metadata=metadata)
    return highest
