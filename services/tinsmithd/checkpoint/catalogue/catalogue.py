"""What checkpoints exist: one SQLite file, one row per checkpoint, and the highest epochs seen.

A checkpoint is visible from the commit of its row on and not before. Calls may come from any
thread. Times are seconds since 1970, from an injected clock.

Each row is checked against its digest whenever it is read. One that is damaged is DataLoss for
whoever asks for it; it is left out of pages, never expires, and can be deleted or overwritten.
"""

import contextlib
import logging
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tinsmithd.checkpoint.catalogue import schema
from tinsmithd.checkpoint.catalogue.failures import catalogue_errors
from tinsmithd.checkpoint.catalogue.record import Checkpoint, read, text_of
from tinsmithd.checkpoint.catalogue.writers import EPOCH_STEP_MAX, Writer, admit, highest_epoch
from tinsmithd.domain import CheckpointKind, CheckpointPath, is_ephemeral_name
from tinsmithd.errors import (
    AlreadyExists,
    DataLoss,
    NotFound,
    Reason,
)

_log = logging.getLogger(__name__)


class Catalogue:
    """The checkpoints of one folder.

    Args:
        file: SQLite's file; made where there is none.
        clock: Seconds since 1970.
        epoch_step_max: See `CheckpointConfig.writer_epoch_step_max`.
        may_be_new: False where an empty catalogue can only be one that was lost.

    Attributes:
        removals: Rises with every checkpoint that went away: then there may be unused files.

    Raises:
        CatalogueUnusable: It is damaged, lost, or of a later version.

    Besides what they say, all calls may raise DataLoss (CHECKPOINT_CORRUPT) where SQLite's file is
    damaged, and Unavailable (CHECKPOINT_UNAVAILABLE) where the disk fails; those that write also
    ResourceExhausted (STORAGE_FULL). Then nothing changed.
    """

    def __init__(
        self,
        file: Path,
        clock: Callable[[], float],
        *,
        may_be_new: bool = True,
        epoch_step_max: int = EPOCH_STEP_MAX,
    ) -> None:
        self._clock = clock
        self._epoch_step_max = epoch_step_max
        self._lock = threading.RLock()
        self._db = schema.open_file(file, may_be_new=may_be_new)
        self._unsettled = False
        self.removals = 0

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def _reading(self, subject: str = "the catalogue") -> Iterator[None]:
        with self._lock, catalogue_errors(subject):
            yield

    @contextlib.contextmanager
    def _writing(self, subject: str = "the catalogue", *, durable: bool = True) -> Iterator[None]:
        """One transaction: done when it ends, or without effect.

        Args:
            subject: What errors speak of.
            durable: False where a loss of power may undo it. The next durable one keeps it, too.
        """
        with self._reading(subject), schema.syncing(self._db, durable=durable):
            try:
                with self._db:
                    self._db.execute("BEGIN IMMEDIATE")
                    yield
            except sqlite3.Error:
                # The disk may have what we were told it has not: see `settle`.
                self._unsettled = True
                raise

    def settle(self) -> None:
        """Make sure that no transaction which failed can come back after a crash.

        A commit that could not be synced may be in the log all the same. Before anything is
        removed because nothing refers to it, the log is emptied.
        """
        with self._reading():
            if self._unsettled:
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                self._unsettled = False

    def get(self, path: CheckpointPath) -> Checkpoint:
        """One checkpoint.

        Raises:
            NotFound: There is none, or it expired (CHECKPOINT_NOT_FOUND).
            DataLoss: What is known of it is damaged (CHECKPOINT_CORRUPT).
        """
        found = self.find(path)
        if found is None:
            raise _not_found(path)
        return found

    def find(self, path: CheckpointPath) -> Checkpoint | None:
        """One checkpoint; None where there is none, or it expired.

        Raises:
            DataLoss: What is known of it is damaged (CHECKPOINT_CORRUPT).
        """
        with self._reading(str(path)):
            return self._find(path)

    def _row(self, path: CheckpointPath) -> sqlite3.Row | None:
        query = "SELECT * FROM checkpoints WHERE model_id=? AND kind=? AND name=?"
        values = (path.model_id, path.kind, path.name)
        row: sqlite3.Row | None = self._db.execute(query, values).fetchone()
        return row

    def _find(self, path: CheckpointPath) -> Checkpoint | None:
        row = self._row(path)
        found = None if row is None else read(row, str(path))
        return None if found is None or self._expired(found) else found

    def _expired(self, checkpoint: Checkpoint) -> bool:
        # Asked of what was read, not in the query: a damaged time must not hide a damaged row.
        return checkpoint.expire_time_s is not None and checkpoint.expire_time_s <= self._clock()

    def add(
        self, checkpoint: Checkpoint, *, overwrite: bool, writer: Writer | None = None
    ) -> Checkpoint:
        """Make a checkpoint visible, durably unless it is ephemeral.

        Returns:
            The checkpoint as it is kept. Without `overwrite` that is the one that was there, if
            the same request made it.

        Raises:
            AlreadyExists: There is one (CHECKPOINT_EXISTS), or one that a request with this id and
                other content made (REQUEST_ID_CONFLICT).
            DataLoss: There is one, and it is damaged; overwriting helps (CHECKPOINT_CORRUPT).
            FailedPrecondition: The writer was replaced (STALE_EPOCH).
        """
        path = checkpoint.path
        with self._writing(str(path), durable=checkpoint.ephemeral is None):
            if writer is not None:
                highest_epoch(self._db, writer)
            if not overwrite and (found := self._find(path)) is not None:
                check_repeat(found, checkpoint.request_id, checkpoint.request_digest)
                return found
            self._delete(path)
            cursor = self._db.execute(
                "INSERT INTO checkpoints (model_id, kind, name, expire_time_s, record, digest)"
                " VALUES (?,?,?,NULL,'','')",
                (path.model_id, path.kind, path.name),
            )
            assert cursor.lastrowid is not None
            kept = replace(checkpoint, number=cursor.lastrowid)
            self._write(kept)
            return kept

    def _write(self, checkpoint: Checkpoint) -> None:
        path, number, record = checkpoint.path, checkpoint.number, text_of(checkpoint)
        expire_time_s = checkpoint.expire_time_s
        if expire_time_s is not None:
            expire_time_s = float(expire_time_s)  # as SQLite gives it back
        key = (path.model_id, path.kind, path.name)
        self._db.execute(
            "UPDATE checkpoints SET expire_time_s=?, record=?, digest=? WHERE number=?",
            (expire_time_s, record, schema.digest_of(number, *key, expire_time_s, record), number),
        )

    def _delete(self, path: CheckpointPath) -> None:
        query = "DELETE FROM checkpoints WHERE model_id=? AND kind=? AND name=?"
        values = (path.model_id, path.kind, path.name)
        self.removals += self._db.execute(query, values).rowcount

    def delete(self, path: CheckpointPath) -> None:
        """Remove a checkpoint, a damaged one too.

        Raises:
            NotFound: There is none (CHECKPOINT_NOT_FOUND).
        """
        with self._writing(str(path)):
            try:
                found = self._find(path) is not None
            except DataLoss:
                found = True
            if not found:
                raise _not_found(path)
            self._delete(path)

    def update(
        self,
        path: CheckpointPath,
        change: Callable[[Checkpoint], Checkpoint],
    ) -> Checkpoint:
        """Change expiry and metadata of a checkpoint; returns it as it is now.

        Raises:
            NotFound: There is none (CHECKPOINT_NOT_FOUND).
            DataLoss: What is known of it is damaged (CHECKPOINT_CORRUPT).
        """
        with self._writing(str(path)):
            changed = change(self.get(path))
            self._write(changed)
            return changed

    def page(
        self, *, model_id: str, kind: CheckpointKind | None, before: int | None, size: int
    ) -> tuple[Sequence[Checkpoint], int]:
        """Checkpoints, newest first, and how many match in all.

        What is damaged is left out, and logged; it is counted.

        Args:
            model_id: Only this model's; empty means all.
            kind: Only this kind; None means all.
            before: Only those with a lower `number`; None begins with the newest.
            size: Maximum number of checkpoints.
        """
        where, values = self._matching(model_id, kind)
        with self._reading():
            total = self._count(where, values)
            if before is not None:
                where, values = where + " AND number<?", [*values, before]
            query = f"SELECT * FROM checkpoints WHERE {where} ORDER BY number DESC"
            found: list[Checkpoint] = []
            with contextlib.closing(self._db.execute(query, values)) as rows:
                for row in rows:
                    with _logged():
                        found.append(read(row))
                    if len(found) >= size:
                        break
            return found, total

    def count(self, kind: CheckpointKind) -> int:
        """How many of a kind there are, damaged ones included."""
        with self._reading():
            return self._count(*self._matching("", kind))

    def _matching(self, model_id: str, kind: CheckpointKind | None) -> tuple[str, list[object]]:
        where = "(expire_time_s IS NULL OR expire_time_s > ?)"
        values: list[object] = [self._clock()]
        if model_id:
            where, values = where + " AND model_id=?", [*values, model_id]
        if kind is not None:
            where, values = where + " AND kind=?", [*values, kind]
        return where, values

    def _count(self, where: str, values: list[object]) -> int:
        query = f"SELECT count(*) FROM checkpoints WHERE {where}"
        return int(self._db.execute(query, values).fetchone()[0])

    def expired(self) -> Collection[int]:
        """Numbers of all checkpoints that are expired now."""
        query = "SELECT * FROM checkpoints WHERE expire_time_s <= ?"
        numbers = []
        with self._reading():
            for row in self._db.execute(query, (self._clock(),)):
                with _logged():
                    numbers.append(read(row).number)
        return numbers

    def delete_expired(self, numbers: Collection[int]) -> int:
        """Remove those of these checkpoints that are expired still; returns how many."""
        query = "DELETE FROM checkpoints WHERE number=? AND expire_time_s <= ?"
        with self._writing():
            now_s = self._clock()
            removed = [self._db.execute(query, (number, now_s)).rowcount for number in numbers]
        self.removals += sum(removed)
        return sum(removed)

    def ephemeral(self) -> Sequence[Checkpoint]:
        """All ephemeral checkpoints, older ones first; those that are damaged are left out."""
        found = []
        with self._reading():
            for row in self._db.execute("SELECT * FROM checkpoints ORDER BY number"):
                with _logged():
                    checkpoint = read(row)
                    if checkpoint.ephemeral is not None:
                        found.append(checkpoint)
        return found

    def present(self, numbers: Collection[int]) -> set[int]:
        """Those of these checkpoints that are there, expired or not."""
        query = "SELECT number FROM checkpoints WHERE number=?"
        with self._reading():
            return {n for n in numbers if self._db.execute(query, (n,)).fetchone() is not None}

    def extend(self, number: int, expire_time_s: float) -> None:
        """Let an ephemeral checkpoint that is there live longer, even if it expired by now."""
        with self._writing():
            checkpoint = self._ephemeral(number)
            if checkpoint is not None:
                self._write(replace(checkpoint, expire_time_s=expire_time_s))

    def delete_ephemeral(self, numbers: Collection[int]) -> int:
        """Remove those of these checkpoints that are ephemeral still; returns how many."""
        with self._writing():
            due = [number for number in numbers if self._ephemeral(number) is not None]
            for number in due:
                self._db.execute("DELETE FROM checkpoints WHERE number=?", (number,))
        self.removals += len(due)
        return len(due)

    def _ephemeral(self, number: int) -> Checkpoint | None:
        row = self._db.execute("SELECT * FROM checkpoints WHERE number=?", (number,)).fetchone()
        with _logged():
            found = None if row is None else read(row)
            return found if found is not None and found.ephemeral is not None else None
        return None

    def contents(self) -> Collection[str]:
        """SHA-256 of every file that a checkpoint refers to: the others may be removed.

        Raises:
            DataLoss: Something is damaged, so that nobody knows (CHECKPOINT_CORRUPT).
        """
        with self._reading():
            self.settle()
            try:
                schema.check_whole(self._db)
            except ValueError as error:
                message = f"the catalogue of checkpoints is damaged: {error}"
                raise DataLoss(message, Reason.CHECKPOINT_CORRUPT) from error
            rows = self._db.execute("SELECT * FROM checkpoints")
            return {blob.sha256 for row in rows for blob in read(row).files}

    def probe(self) -> None:
        """Do nothing, as long as checkpoints can be looked up."""
        with self._reading():
            self._db.execute("SELECT number FROM checkpoints LIMIT 1").fetchall()

    def admit(self, writer: Writer) -> None:
        """Let a writer begin, and refuse writers of lower epochs durably from then on.

        Raises:
            FailedPrecondition: It was replaced by one of a higher epoch (STALE_EPOCH).
            InvalidArgument: Its epoch is too far above the highest that was seen.
            DataLoss: Nobody knows any more whether it was (CHECKPOINT_CORRUPT).
        """
        with self._writing():
            admit(self._db, writer, self._epoch_step_max)


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


def _not_found(path: CheckpointPath) -> NotFound:
    message = f"no checkpoint {path}"
    if is_ephemeral_name(path.name):
        message += (
            "; sampler weights without a name are reclaimed when no client holds them and their "
            "model has newer ones or is deleted: save them again, or under a name"
        )
    return NotFound(message, Reason.CHECKPOINT_NOT_FOUND)


@contextlib.contextmanager
def _logged() -> Iterator[None]:
    """Log what is damaged and go on without it."""
    try:
        yield
    except DataLoss as error:
        _log.error("%s", error.message)
