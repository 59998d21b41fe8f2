"""What checkpoints exist: one SQLite file, one row per checkpoint, and the highest epochs seen.

A checkpoint is visible from the commit of its row on and not before. Calls may come from any
thread. Times are seconds since 1970, from an injected clock.

Each row is checked against its digest whenever it is read. One that is damaged is DataLoss for
whoever asks for it; it is left out of pages, never expires, and can be deleted or overwritten.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from sqlite3 import Row
from typing import TypeVar

from tinsmithd.checkpoint.catalogue import owned, tallies
from tinsmithd.checkpoint.catalogue.file import CatalogueFile
from tinsmithd.checkpoint.catalogue.record import Checkpoint, read
from tinsmithd.checkpoint.catalogue.references import References
from tinsmithd.checkpoint.catalogue.refusals import (
    check_repeat,
    check_stored,
    log,
    logged,
    not_found,
)
from tinsmithd.checkpoint.catalogue.rows import Rows
from tinsmithd.checkpoint.catalogue.transactions import LocalTransactions, Transactions
from tinsmithd.checkpoint.catalogue.writers import EPOCH_STEP_MAX, Writer, admit, highest_epoch
from tinsmithd.domain import CheckpointKind, CheckpointPath
from tinsmithd.errors import DataLoss
from tinsmithd.owners import ANY_OWNER

T = TypeVar("T")


def open_local(file: Path, *, may_be_new: bool) -> LocalTransactions:
    """The catalogue that this process alone has, in a file.

    Args:
        file: SQLite's file; made where there is none.
        may_be_new: False where an empty catalogue can only be one that was lost.

    Raises:
        CatalogueUnusable: It is damaged or lost.
        FormatUnknown: A later release wrote it.
    """
    opened = CatalogueFile(file, may_be_new=may_be_new)
    try:
        return LocalTransactions(opened)
    except BaseException:
        opened.db.close()
        raise


class Catalogue:
    """What checkpoints exist.

    Args:
        transactions: Have SQLite's file; closed with the catalogue.
        clock: Seconds since 1970.
        epoch_step_max: See `CheckpointConfig.writer_epoch_step_max`.

    Attributes:
        told: See `Transactions`.
        references: Which files checkpoints have.

    Besides what they say, all calls may raise DataLoss (CHECKPOINT_CORRUPT) where SQLite's file is
    damaged, and Unavailable (CHECKPOINT_UNAVAILABLE) where the disk fails; those that write also
    ResourceExhausted (STORAGE_FULL). Then nothing changed.
    """

    def __init__(
        self,
        transactions: Transactions,
        clock: Callable[[], float],
        *,
        epoch_step_max: int = EPOCH_STEP_MAX,
    ) -> None:
        self._transactions = transactions
        self._clock = clock
        self._epoch_step_max = epoch_step_max
        self._db = transactions.db
        self._reading = transactions.reading
        self.refresh = transactions.refresh
        self.settle = transactions.settle
        self.tidy = transactions.tidy
        self.told = transactions.told
        self.held_elsewhere = transactions.held_elsewhere
        self.references = References(transactions)

    def close(self) -> None:
        """Close the file."""
        self._transactions.close()

    def _write(
        self, body: Callable[[Rows], T], subject: str = "the catalogue", *, durable: bool = True
    ) -> T:
        """One transaction, see `Transactions.write`."""
        return self._transactions.write(body, subject, durable=durable)

    def get(self, path: CheckpointPath, *, fresh: bool = True) -> Checkpoint:
        """One checkpoint.

        Args:
            path: Which one.
            fresh: False where the catalogue was refreshed for this call.

        Raises:
            NotFound: There is none, or it expired (CHECKPOINT_NOT_FOUND).
            DataLoss: What is known of it is damaged (CHECKPOINT_CORRUPT).
        """
        found = self.find(path, fresh=fresh)
        if found is None:
            raise not_found(path)
        return found

    def find(self, path: CheckpointPath, *, fresh: bool = True) -> Checkpoint | None:
        """One checkpoint; None where there is none, or it expired; see `get`.

        Raises:
            DataLoss: What is known of it is damaged (CHECKPOINT_CORRUPT).
        """
        with self._reading(str(path), fresh=fresh):
            return self._find(path)

    def _find(self, path: CheckpointPath) -> Checkpoint | None:
        query = "SELECT * FROM checkpoints WHERE model_id=? AND kind=? AND name=?"
        values = (path.model_id, path.kind, path.name)
        row: Row | None = self._db.execute(query, values).fetchone()
        found = None if row is None else read(row, str(path))
        return None if found is None or self._expired(found) else found

    def _expired(self, checkpoint: Checkpoint) -> bool:
        # Asked of what was read, not in the query: a damaged time must not hide a damaged row.
        return checkpoint.expire_time_s is not None and checkpoint.expire_time_s <= self._clock()

    def add(
        self,
        checkpoint: Checkpoint,
        *,
        overwrite: bool,
        writer: Writer | None = None,
        stored_max: int = 0,
    ) -> Checkpoint:
        """Make a checkpoint visible, durably unless it is ephemeral.

        Args:
            checkpoint: Which one.
            overwrite: Replace another one.
            writer: Who must not have been replaced.
            stored_max: Bytes that its owner may have stored with it; 0: any number.

        Returns:
            The checkpoint as it is kept. Without `overwrite` that is the one that was there, if
            the same request made it.

        Raises:
            AlreadyExists: There is one (CHECKPOINT_EXISTS), or one that a request with this id and
                other content made (REQUEST_ID_CONFLICT).
            DataLoss: There is one, and it is damaged; overwriting helps (CHECKPOINT_CORRUPT).
            FailedPrecondition: The writer was replaced (STALE_EPOCH).
            ResourceExhausted: Its owner would have too much (QUOTA_EXCEEDED).
        """
        path = checkpoint.path

        def body(rows: Rows) -> Checkpoint:
            if writer is not None:
                highest_epoch(rows.db, writer)
            if not overwrite and (found := self._find(path)) is not None:
                check_repeat(found, checkpoint.request_id, checkpoint.request_digest)
                return found
            added = rows.add(checkpoint)
            if stored_max:
                # Here: of many that come at once each was looked at before there were the others.
                check_stored(owned.stored_bytes(rows.db, path.owner, self._clock()), stored_max)
            return added

        return self._write(body, str(path), durable=checkpoint.ephemeral is None)

    def delete(self, path: CheckpointPath) -> None:
        """Remove a checkpoint, a damaged one too.

        Raises:
            NotFound: There is none (CHECKPOINT_NOT_FOUND).
        """

        def body(rows: Rows) -> None:
            try:
                found = self._find(path) is not None
            except DataLoss:
                found = True
            if not found:
                raise not_found(path)
            rows.remove_path(path)

        self._write(body, str(path))

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

        def body(rows: Rows) -> Checkpoint:
            found = self._find(path)
            if found is None:
                raise not_found(path)
            changed = change(found)
            rows.write(changed)
            return changed

        return self._write(body, str(path))

    def anybodys(self, path: CheckpointPath) -> CheckpointPath:
        """A path, or where nothing is there, the newest one that another owner has of this name."""
        with self._reading(str(path), fresh=True):
            inner = owned.anybodys(self._db, path)
        return path if inner is None else replace(path, model_id=inner)

    def stored_bytes(self, owner: str) -> int:
        """Bytes of an owner's checkpoints; files that several have count for each of them."""
        with self._reading(fresh=True):
            return owned.stored_bytes(self._db, owner, self._clock())

    def page(
        self,
        *,
        owner: str = ANY_OWNER,
        model_id: str,
        kind: CheckpointKind | None,
        before: int | None,
        size: int,
    ) -> tuple[Sequence[Checkpoint], int]:
        """Checkpoints, newest first, and how many match in all; see `page_of`."""
        which = (owner, model_id, kind)
        return self.page_of(read, *which, before=before, size=size)

    def page_of(
        self,
        make: Callable[[Row], T],
        owner: str,
        model_id: str,
        kind: CheckpointKind | None,
        *,
        before: int | None,
        size: int,
    ) -> tuple[Sequence[T], int]:
        """What is made of the rows of checkpoints, newest first, and how many match in all.

        What is damaged is left out, and logged; it is counted.

        Args:
            make: Checks a row and makes something of it, while others use the catalogue; raises
                DataLoss where the row is damaged, as `read` does.
            owner: Only this one's; `ANY_OWNER` means all.
            model_id: Only this model's, as its owner says it; empty means all.
            kind: Only this kind; None means all.
            before: Only those with a lower `number`; None begins with the newest.
            size: Maximum number of checkpoints.
        """
        which, now_s = (owner, model_id, kind), self._clock()
        below = 2**62 if before is None else before
        with self._reading(fresh=True):
            total = owned.count(self._db, *which, now_s)
            rows = owned.newest_first(self._db, *which, below, now_s, size)
        found: list[T] = []
        while True:
            for row in rows:
                try:
                    found.append(make(row))
                except DataLoss as error:
                    log(error)
            if len(found) >= size or not rows:
                return found, total
            with self._reading():  # in place of those that are damaged, if there are more
                below = rows[-1]["number"]
                rows = owned.newest_first(self._db, *which, below, now_s, size - len(found))

    def count(self, kind: CheckpointKind) -> int:
        """How many of a kind there are, damaged ones included."""
        with self._reading():
            return owned.count(self._db, ANY_OWNER, "", kind, self._clock())

    @property
    def rows(self) -> int:
        """How many there are, expired ones included."""
        with self._reading():
            return tallies.sums(self._db, ANY_OWNER, None)[0]

    def expired(self) -> Collection[int]:
        """Numbers of all checkpoints that seem to be expired now, damaged ones among them."""
        with self._reading():
            return [row["number"] for row in self._db.execute(owned.EXPIRED, (self._clock(),))]

    def delete_expired(self, numbers: Collection[int]) -> int:
        """Remove those of these checkpoints that are expired still; returns how many."""
        query = "SELECT * FROM checkpoints WHERE number=? AND expire_time_s <= ?"

        def body(rows: Rows) -> int:
            now_s = self._clock()
            for number in numbers:
                row = rows.db.execute(query, (number, now_s)).fetchone()
                with logged():
                    if row is not None and read(row):
                        rows.remove(number)
            return rows.removals

        return self._write(body)

    def ephemeral(self) -> Sequence[Checkpoint]:
        """All ephemeral checkpoints, older ones first; those that are damaged are left out."""
        found = []
        with self._reading():
            for row in self._db.execute(owned.EPHEMERAL):
                with logged():
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

        def body(rows: Rows) -> None:
            checkpoint = self._ephemeral(number)
            if checkpoint is not None:
                rows.write(replace(checkpoint, expire_time_s=expire_time_s))

        self._write(body)

    def hold(self, numbers: Collection[int]) -> None:
        """Tell other processes which ephemeral checkpoints that are there are in use."""

        def body(rows: Rows) -> None:
            there = [number for number in numbers if self._ephemeral(number) is not None]
            if there:
                rows.hold(there)

        self._write(body)

    def delete_ephemeral(self, numbers: Collection[int]) -> int:
        """Remove those of these checkpoints that are ephemeral still; returns how many.

        What another process said is in use stays.
        """

        def body(rows: Rows) -> int:
            for number in sorted(set(numbers) - self.held_elsewhere(numbers)):
                if self._ephemeral(number) is not None:
                    rows.remove(number)
            return rows.removals

        return self._write(body)

    def _ephemeral(self, number: int) -> Checkpoint | None:
        row = self._db.execute("SELECT * FROM checkpoints WHERE number=?", (number,)).fetchone()
        with logged():
            found = None if row is None else read(row)
            return found if found is not None and found.ephemeral is not None else None
        return None

    def unused(self, places: Sequence[str]) -> Collection[str]:
        """Those of these places that no checkpoint refers to, where the file knows places.

        Raises:
            DataLoss: Something is damaged, so that nobody knows (CHECKPOINT_CORRUPT).
        """
        query = "SELECT 1 FROM places WHERE place=? LIMIT 1"
        with self._reading(fresh=True):
            return [
                place for place in places if self._db.execute(query, (place,)).fetchone() is None
            ]

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
        self._write(lambda rows: admit(rows, writer, self._epoch_step_max))
