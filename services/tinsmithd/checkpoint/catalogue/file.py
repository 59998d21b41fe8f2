"""The catalogue's SQLite file while a process has it: opened, checked, and brought up to its log.

What is committed is in SQLite's log. `settle` copies the log into the file, which takes some times
as long as a commit: so no commit does it, see `LocalTransactions`.
"""

import contextlib
import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from tinsmithd.checkpoint.catalogue import schema, tallies, wal
from tinsmithd.checkpoint.catalogue.sums import PageSums

_log = logging.getLogger(__name__)


class CatalogueUnusable(Exception):
    """The catalogue cannot be read, so that nothing can be served; the message says what to do."""


class CatalogueFile:
    """Whole and of this format; empty where there was none.

    Args:
        file: SQLite's file.
        may_be_new: False where an empty catalogue can only be one that was lost.
        beside: SQL of tables that it has besides the catalogue's.
        may_be_lost: It is not brought up to date from another format.

    Attributes:
        db: The connection.

    Raises:
        CatalogueUnusable: It is damaged or lost.
        FormatUnknown: A later release wrote it.
    """

    def __init__(
        self, file: Path, *, may_be_new: bool, beside: str = "", may_be_lost: bool = False
    ) -> None:
        self.path = file
        self._log_path = file.with_name(file.name + "-wal")
        self._sums = PageSums(file, self._log_path)
        self.db = sqlite3.connect(file, check_same_thread=False, isolation_level=None)
        try:
            with unusable(file):
                self._prepare(beside, may_be_new=may_be_new, may_be_lost=may_be_lost)
        except BaseException:
            self.db.close()
            raise

    def _prepare(self, beside: str, *, may_be_new: bool, may_be_lost: bool) -> None:
        db = self.db
        schema.set_up(db)
        self._has_sums = self._sums.match()
        self._makes_sums = not self._has_sums
        if self._makes_sums:
            schema.check_whole(db)
        found = schema.CATALOGUE.read(db)
        if may_be_lost and 0 < found != schema.CATALOGUE.known:
            raise ValueError(f"it is not of format {schema.CATALOGUE.known}")
        version = schema.CATALOGUE.look(db, self.path)
        if version == 0 and not may_be_new:
            raise ValueError("it is empty, and there are stored files that it should know")
        is_old = version < schema.CATALOGUE.known
        if is_old:
            with db:
                db.execute("BEGIN IMMEDIATE")
                schema.CATALOGUE.bring_up(db)
                if version == 0:
                    schema.make_tables(db, beside)
        schema.check_tables(db, beside)
        if self._makes_sums and not is_old:
            # Damage of a tally breaks no page: what says nothing of its own is made of the rows.
            with contextlib.suppress(sqlite3.OperationalError), db:  # on a disk that is full
                db.execute("BEGIN IMMEDIATE")
                tallies.count_anew(db)

    def close(self) -> None:
        """Close the file, with nothing in its log if the disk takes it."""
        with contextlib.suppress(sqlite3.Error):
            self.settle()
        self._sums.sync()
        self.db.close()

    def settle(self) -> int:
        """Copy SQLite's log into the file, durably.

        Returns:
            How many pages were copied.

        Raises:
            sqlite3.Error: The disk does not take it.
        """
        done = self.db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        busy, logged, copied = done or (1, 0, 0)
        if busy or copied < logged:
            raise sqlite3.OperationalError("the log cannot be copied into the file now")
        if self._makes_sums:  # once: it reads the whole file
            self._makes_sums, self._has_sums = False, self._sums.make()
        elif self._has_sums:
            self._has_sums = self._sums.note(wal.frames(self._log_path, max(logged, 0)))
        return max(logged, 0)

    def empty_log(self) -> None:
        """Copy SQLite's log into the file, and let nothing be in it: no commit that failed, too."""
        self.settle()
        self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def sync_sums(self) -> None:
        """Wait until the sums of pages are on the disk; without them a start takes longer."""
        self._sums.sync()


@contextlib.contextmanager
def unusable(file: Path) -> Iterator[None]:
    """Say of what is wrong with a catalogue what can be done.

    Raises:
        CatalogueUnusable: Something is.
    """
    try:
        yield
    except (sqlite3.DatabaseError, ValueError) as error:
        why = " ".join(str(error).split())  # SQLite's own words may be many lines
        raise CatalogueUnusable(
            f"the catalogue {file} cannot be used: {why}; restore it from a backup, or try"
            " sqlite3's .recover on a copy"
        ) from error
