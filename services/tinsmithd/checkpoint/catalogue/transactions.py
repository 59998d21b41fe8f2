"""Transactions on the catalogue's file, where this process alone has it."""

import contextlib
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from tinsmithd.checkpoint.catalogue import schema
from tinsmithd.checkpoint.catalogue.failures import catalogue_errors
from tinsmithd.checkpoint.catalogue.file import CatalogueFile, unusable
from tinsmithd.checkpoint.catalogue.record import Checkpoint, intact
from tinsmithd.checkpoint.catalogue.redo import Redo
from tinsmithd.checkpoint.catalogue.rows import Rows

T = TypeVar("T")

SETTLE_S = 1.0
"""How long a commit may be in SQLite's log and not in its file."""
COMMITS_MAX = 16
"""After so many the log is copied at once: what waits for that waits some milliseconds."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class News:
    """What another process did.

    Attributes:
        made: Checkpoints that are new.
        changed: Those that it changed, as they are now.
        removed: Numbers of those that it removed.
    """

    made: Sequence[Checkpoint]
    changed: Sequence[Checkpoint]
    removed: Sequence[int]


class Transactions(Protocol):
    """How the catalogue reads and writes its file. Calls may come from any thread.

    Attributes:
        db: The file; used within `reading`, or in the body of `write`.
        told: Called for what other processes did, once this one knows. None of them may wait.
        committed: Called for what this process did, before it is done. None of them may wait.
    """

    db: sqlite3.Connection
    told: list[Callable[[News], object]]
    committed: list[Callable[[Rows], object]]

    def close(self) -> None:
        """Close the file."""

    def refresh(self) -> None:
        """Take in what other processes committed before this call."""

    def reading(
        self, subject: str = ..., *, fresh: bool = ...
    ) -> contextlib.AbstractContextManager:
        """Read in the body of the `with`, and meet no change there.

        Args:
            subject: What errors speak of.
            fresh: Whether all that any process committed before this call must be there.
        """
        ...

    def write(self, body: Callable[[Rows], T], subject: str = ..., *, durable: bool = ...) -> T:
        """One transaction: done when this returns, or without effect.

        Args:
            body: Makes it; it may be called again where another process was faster.
            subject: What errors speak of.
            durable: False where a loss of power may undo it. The next durable one keeps it, too.
        """
        ...

    def settle(self) -> None:
        """Make sure that no transaction which failed can come back after a crash."""

    def tidy(self) -> None:
        """Keep short what a start has to read.

        Raises:
            Unavailable: The store does not answer (CHECKPOINT_UNAVAILABLE).
        """

    def held_elsewhere(self, numbers: Iterable[int]) -> set[int]:
        """Those of these ephemeral checkpoints that other processes said are in use."""
        ...


class LocalTransactions:
    """See `Transactions`.

    A commit is in two places when it is done: SQLite's log, and `redo` or SQLite's file. The log is
    copied into the file by a thread, `SETTLE_S` later or once there are many commits, between two
    calls.

    Args:
        file: SQLite's file; closed with this.

    Raises:
        CatalogueUnusable: What was committed lately is not known.
    """

    def __init__(self, file: CatalogueFile) -> None:
        self.db = file.db
        self.told: list[Callable[[News], object]] = []
        self.committed: list[Callable[[Rows], object]] = []
        self._file = file
        self._lock = threading.RLock()
        self._unsettled = False
        with unusable(file.path):
            self._identity, self._position = self._at()
            self._redo = Redo(file.path.with_suffix(".redo"), self._identity)
            try:
                self._make_again()
            except BaseException:
                self._redo.close()
                raise
        self._commits = 0
        self._settle()
        self._is_closed = False
        self._due, self._hurry = threading.Event(), threading.Event()
        self._settler = threading.Thread(target=self._settle_when_due, daemon=True, name="settle")
        self._settler.start()

    def _at(self) -> tuple[str, int]:
        """Which catalogue this is for `redo`, and the last commit that is in SQLite's file."""
        query = "SELECT identity, position, digest FROM redo"
        row = self.db.execute(query).fetchone()
        if row is None or not intact(row):
            _log.warning("what %s says of its redo is damaged: that is begun anew", self._file.path)
            with contextlib.suppress(sqlite3.OperationalError), self.db:
                self.db.execute("BEGIN IMMEDIATE")
                schema.identify(self.db)
            row = self.db.execute(query).fetchone()
        if row is None or not intact(row):
            return "", 0  # the disk takes nothing
        return row["identity"], row["position"]

    def _make_again(self) -> None:
        """Make the commits again that SQLite has forgotten with its log."""
        missing = self._redo.after(self._position)
        if not missing:
            return
        with self.db:
            self.db.execute("BEGIN IMMEDIATE")
            rows = Rows(self.db, repeats=True)
            for position, changes in missing:
                for change in changes:
                    rows.make(change)
                self._position = position
            schema.set_position(self.db, self._identity, self._position)
        _log.warning("SQLite's log was damaged: %d commits are made again", len(missing))

    def close(self) -> None:
        """See `Transactions`."""
        self._is_closed = True
        self._due.set()
        self._hurry.set()
        self._settler.join()
        with self._lock:
            self._file.close()
            self._redo.close()

    def refresh(self) -> None:
        """See `Transactions`."""

    @contextlib.contextmanager
    def reading(self, subject: str = "the catalogue", *, fresh: bool = False) -> Iterator[None]:
        """See `Transactions`."""
        with self._lock, catalogue_errors(subject):
            yield

    def write(
        self, body: Callable[[Rows], T], subject: str = "the catalogue", *, durable: bool = True
    ) -> T:
        """See `Transactions`."""
        with self.reading(subject):
            try:
                rows, done, is_twice = self._commit(body, durable=durable)
            except sqlite3.OperationalError as error:
                # On a full disk the log cannot grow, but it can begin anew.
                is_full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
                if not (is_full and self._settle()):
                    raise
                rows, done, is_twice = self._commit(body, durable=durable)
            if rows.changes:
                self._committed(rows, settles=durable and not is_twice)
            return done

    def _committed(self, rows: Rows, *, settles: bool) -> None:
        """A transaction was made that changed something."""
        if settles:
            self._settle()
        self._commits += 1
        self._due.set()
        if self._commits >= COMMITS_MAX:
            self._hurry.set()
        for hear in self.committed:
            hear(rows)

    def _commit(self, body: Callable[[Rows], T], *, durable: bool) -> tuple[Rows, T, bool]:
        """One transaction: what it changed, what came of it, and whether it is in `redo`, too."""
        rows = Rows(self.db)
        appended, waited = False, None
        try:
            with schema.syncing(self.db, durable=durable), self.db:
                self.db.execute("BEGIN IMMEDIATE")
                done = body(rows)
                if not rows.changes:
                    return rows, done, True
                schema.set_position(self.db, self._identity, self._position + 1)
                appended = self._redo.append(self._position + 1, rows.changes)
                if appended and durable:
                    waited = self._redo.sync()  # beside SQLite, which waits for its log
        except BaseException as error:
            if waited is not None:
                waited.result()
            if appended:
                self._redo.take_back()
            if isinstance(error, sqlite3.Error):
                # The disk may have what we were told it has not: see `settle`.
                self._unsettled = True
            raise
        self._position += 1
        return rows, done, appended and (waited is None or waited.result())

    def settle(self) -> None:
        """See `Transactions`.

        A commit that could not be synced may be in the log all the same. Before anything is
        removed because nothing refers to it, the log is emptied.
        """
        with self.reading():
            if self._unsettled:
                self._file.empty_log()
                self._redo.clear()
                self._unsettled = False

    def _settle(self) -> bool:
        """Copy SQLite's log into the file; whether there was anything, and the disk took it."""
        try:
            copied = self._file.settle()
            self._redo.begin_anew()
            self._commits = 0
            if copied:
                schema.begin_log(self.db)
        except (sqlite3.Error, OSError) as error:
            _log.warning("the catalogue's log stays until later: %s", error)
            return False
        return copied > 0

    def _settle_when_due(self) -> None:
        while True:
            self._due.wait()
            self._hurry.wait(SETTLE_S)
            self._due.clear()
            self._hurry.clear()
            if self._is_closed:
                return
            with self._lock:
                self._settle()
            self._file.sync_sums()

    def tidy(self) -> None:
        """See `Transactions`."""

    def held_elsewhere(self, numbers: Iterable[int]) -> set[int]:
        """See `Transactions`."""
        return set()
