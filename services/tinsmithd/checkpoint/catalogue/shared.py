"""Transactions on a catalogue that several processes share: each is an entry of one log.

Each process has a file of its own, which is what the log says up to some position. A transaction is
tried on that file and undone; what it would change is put into the log at the next position, which
only one process gets; then the file takes it in, as it does every other process's entries. Who does
not get the position reads what came, and tries anew. So a transaction always saw all that was
before it, and transactions that wait at the same time make one entry.
"""

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, TypeVar

from tinsmithd.checkpoint.catalogue import view
from tinsmithd.checkpoint.catalogue.entry import Entry, decode, digest_in
from tinsmithd.checkpoint.catalogue.failures import catalogue_errors
from tinsmithd.checkpoint.catalogue.file import CatalogueUnusable
from tinsmithd.checkpoint.catalogue.group import Group, Job
from tinsmithd.checkpoint.catalogue.holds import Holds
from tinsmithd.checkpoint.catalogue.record import Checkpoint, read
from tinsmithd.checkpoint.catalogue.refusals import logged
from tinsmithd.checkpoint.catalogue.rows import Change, Rows
from tinsmithd.checkpoint.catalogue.transactions import News
from tinsmithd.checkpoint.store import RETRY_UNAVAILABLE_S, Log, Snapshot, whole
from tinsmithd.errors import Reason, TinsmithError, Unavailable

T = TypeVar("T")

AHEAD = 16
"""Entries that are read at once by who is behind."""
SURE_S = 600.0
"""For how long a look at the log vouches for there being no gap before the next position."""
SNAPSHOT_ENTRIES = 1000
"""Entries after a snapshot from which on another one is made, if they are many bytes, too."""
SNAPSHOT_SHARE = 4
"""Those are many that have a quarter of the bytes of the last snapshot."""
STUCK_MAX = 8
"""How often a position may be taken and nothing be there, before that is an error: a store says so
while somebody else's put is under way."""
STUCK_S = 0.05
"""The first pause after that; the others are twice as long each, up to a second."""

_log = logging.getLogger(__name__)


@dataclass
class _Looks:
    """Looks at the log, one at a time, which several callers share."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    begun: int = 0
    done: int = 0
    failures: int = 0
    failure: TinsmithError | None = None


class SharedTransactions:
    """See `Transactions`.

    Args:
        file: This process's file; made where there is none, or none that can be used.
        log: What the processes share.
        hold_s: How long what another process said is in use counts as that, seconds.
        monotonic: A clock that nobody sets.

    Attributes:
        told: See `Transactions`.

    Raises:
        CatalogueUnusable: The log cannot be read.
    """

    def __init__(
        self,
        file: Path,
        log: Log,
        *,
        hold_s: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.told: list[Callable[[News], object]] = []
        self.committed: list[Callable[[Rows], object]] = []
        self._file = file
        self._log = log
        self._monotonic = monotonic
        self._replica = secrets.token_hex(8)
        self._lock = threading.RLock()
        self._looks = _Looks()
        self._group = Group(self._commit)
        self._expected = ""
        self._arrived = ""
        """Nonces: of the entry that is being put here, and of the last such one that is there."""
        self._holds = Holds(hold_s, monotonic)
        self._ahead = ThreadPoolExecutor(AHEAD, thread_name_prefix="log")
        self._view = view.open_view(file)
        self.db = self._view.db
        try:
            self._at = self._begin()
            self._sure_s = monotonic()
            self.refresh()
            self._check_whole()
        except (TinsmithError, OSError) as error:
            self._view.close()
            why = whole(error) if isinstance(error, TinsmithError) else str(error)
            raise CatalogueUnusable(f"the store's log cannot be read: {why}") from error
        except BaseException:
            self._view.close()
            raise

    def _begin(self) -> Snapshot:
        """Where the file is, or where the log begins to be read after it was made anew."""
        newest = self._log.newest_snapshot() or Snapshot(0, 0)
        found = view.position_of(self.db, self._log.identity)
        if found is None or newest.position > found[0].position:
            return self._rebuild(newest if newest.position else None)
        at, known = found
        if at.position > newest.position:
            entry = self._log.read(at.position)
            if entry is None:
                self._refuse_to_begin(
                    f"ends before entry {at.position}, which this server has seen"
                )
            if known and digest_in(entry) != known:
                self._refuse_to_begin(f"has another entry {at.position} than this server has seen")
        elif at.log_bytes != newest.log_bytes:
            self._refuse_to_begin(f"has others up to entry {at.position} than this server has seen")
        return at

    def _rebuild(self, newest: Snapshot | None) -> Snapshot:
        at = view.rebuild(self.db, self._log, newest)
        self._view.count(at.log_bytes)
        return at

    def _check_whole(self) -> None:
        """Make sure that the log ends where no entry is, and has lost none of those before."""
        position = self._at.position
        following = self._log.first_after(position)
        if following is not None and following > position + 1:
            lost = f"entries {position + 1} to {following - 1}"
            self._refuse_to_begin(f"has no {lost}, and has later ones")

    def _refuse_to_begin(self, why: str) -> NoReturn:
        """The store is not what the file was made of, as where somebody restored an earlier one."""
        message = f"the store's log {why}: restore the store, or remove {self._file}"
        raise CatalogueUnusable(message)

    def close(self) -> None:
        """See `Transactions`."""
        self._ahead.shutdown()
        with self._lock:
            self._view.close()

    @contextlib.contextmanager
    def reading(self, subject: str = "the catalogue", *, fresh: bool = False) -> Iterator[None]:
        """See `Transactions`."""
        if fresh:
            self.refresh()
        with self._lock, catalogue_errors(subject):
            yield

    def settle(self) -> None:
        """See `Transactions`: a transaction that failed is in the log or not, and read from it."""

    # --- what others did --------------------------------------------------------------------------

    def refresh(self) -> None:
        """See `Transactions`.

        Raises:
            Unavailable: The store does not answer (CHECKPOINT_UNAVAILABLE).
            DataLoss: Its log is damaged (CHECKPOINT_CORRUPT).
        """
        looks = self._looks
        seen, failures = looks.begun, looks.failures
        with looks.lock:
            if looks.done > seen:
                return  # one that began after this call
            if looks.failures > failures and looks.failure is not None:
                raise looks.failure  # it has waited for that long enough
            looks.begun += 1
            try:
                self._follow()
            except TinsmithError as error:
                looks.failures, looks.failure = looks.failures + 1, error
                raise
            looks.done = looks.begun

    def _follow(self) -> None:
        began_s = self._monotonic()
        while True:
            position = self._at.position
            first = self._log.read(position + 1)
            if first is None:
                break
            self._take_in(position + 1, first)
            following = range(position + 2, position + 2 + AHEAD)
            for found, data in zip(
                following, self._ahead.map(self._log.read, following), strict=True
            ):
                if data is None:
                    break
                self._take_in(found, data)
        self._check_gap(began_s)

    def _check_gap(self, began_s: float) -> None:
        """Make sure that the log ends here, and does not only begin later by now.

        Entries go once a snapshot has them. So there is no gap before one that no snapshot has.
        """
        position = self._at.position
        newest = self._log.newest_snapshot() if began_s - self._sure_s > SURE_S else None
        if newest is not None and newest.position > position:
            _log.warning("entries after %d are gone: the catalogue is made anew", position)
            with self._lock, catalogue_errors():
                self._at = self._rebuild(newest)
                self._holds.hold_all()
                news = News(self._ephemeral(), (), ())
            self._tell(news)
            self._sure_s = began_s
            self._follow()
            return
        self._sure_s = began_s

    def _take_in(self, position: int, data: bytes) -> None:
        """Let the file have the entry of a position, unless it has it by now."""
        entry = decode(data, position)
        with self._lock, catalogue_errors():
            if position != self._at.position + 1:
                return
            before = view.sequence_of(self.db)
            at = Snapshot(position, self._at.log_bytes + len(data))
            with self.db:
                self.db.execute("BEGIN IMMEDIATE")
                rows = Rows(self.db, with_places=True)
                for change in entry.changes:
                    rows.make(change)
                view.set_position(self.db, self._log.identity, at, digest_in(data))
            self._view.count(len(data))
            self._at = at
            # One that came after it was given up here is as another server's: nobody knows of it.
            if entry.replica == self._replica and entry.nonce == self._expected:
                self._arrived = entry.nonce
                return
            self._holds.hear(entry.changes)
            news = self._news(entry.changes, before)
        self._tell(news)

    def _tell(self, news: News) -> None:
        for tell in self.told:
            tell(news)

    def _ephemeral(self) -> Sequence[Checkpoint]:
        """Those that whoever grants leases has to know."""
        found = []
        # The text says "ephemeral" where it is one, or where a user wrote that.
        query = """SELECT * FROM checkpoints WHERE record LIKE '%"ephemeral"%'"""
        for row in self.db.execute(query):
            with logged():
                found.append(read(row))
        return [checkpoint for checkpoint in found if checkpoint.ephemeral is not None]

    def _news(self, changes: Iterable[Change], before: int) -> News:
        made: list[Checkpoint] = []
        changed: list[Checkpoint] = []
        removed: list[int] = []
        for what, number, *_ in changes:
            if what == "remove":
                removed.append(number)
            if what == "put":
                query = "SELECT * FROM checkpoints WHERE number=?"
                row = self.db.execute(query, (number,)).fetchone()
                with logged():
                    found = [] if row is None else [read(row)]
                    (made if number > before else changed).extend(found)
        return News(made, changed, removed)

    def held_elsewhere(self, numbers: Iterable[int]) -> set[int]:
        """See `Transactions`."""
        with self._lock:
            return self._holds.of(numbers)

    # --- what this process does -------------------------------------------------------------------

    def write(
        self, body: Callable[[Rows], T], subject: str = "the catalogue", *, durable: bool = True
    ) -> T:
        """See `Transactions`; what is in the log is durable.

        Raises:
            Unavailable: The store does not answer; it may be done (CHECKPOINT_UNAVAILABLE).
        """
        rows, done = self._group.write(body, subject)
        for hear in self.committed:
            hear(rows)
        return done

    def _commit(self, jobs: Sequence[Job]) -> None:
        stuck = 0
        while True:
            position = self._try(jobs)
            changes = [change for job in jobs if job.rows for change in job.rows.changes]
            if changes and self._put(position + 1, changes):
                return
            # Others were faster; or there is nothing to write, and what was seen must be the end.
            self.refresh()
            if self._at.position > position:
                stuck = 0
                continue
            if not changes:
                return
            stuck += 1
            if stuck > STUCK_MAX:
                message = f"the store has no entry {position + 1} of its log, and takes none"
                raise Unavailable(
                    message, Reason.CHECKPOINT_UNAVAILABLE, retry_after_s=RETRY_UNAVAILABLE_S
                )
            time.sleep(min(STUCK_S * 2**stuck, 1.0))

    def _put(self, position: int, changes: Sequence[Change]) -> bool:
        """Make changes the entry of a position, and take it in; False where another one is there.

        Raises:
            Unavailable: It may be there, and may come later (CHECKPOINT_UNAVAILABLE).
        """
        entry = Entry(self._replica, secrets.token_hex(8), changes)
        data, self._expected = entry.encode(), entry.nonce
        try:
            if not self._append(position, data):
                return False
            self._take_in(position, data)
            return True
        finally:
            with self._lock:
                self._expected = ""

    def _try(self, jobs: Sequence[Job]) -> int:
        """Run transactions one after the other, and undo all; returns the position before them."""
        with self._lock, catalogue_errors():
            self.db.execute("BEGIN IMMEDIATE")
            try:
                for job in jobs:
                    self._try_one(job)
            finally:
                if self.db.in_transaction:  # a full disk has ended it by itself
                    self.db.execute("ROLLBACK")
            return self._at.position

    def _try_one(self, job: Job) -> None:
        job.result, job.error, job.rows = None, None, None
        self.db.execute("SAVEPOINT one")
        rows = Rows(self.db, with_places=True)
        try:
            with catalogue_errors(job.subject):
                job.result = job.body(rows)
            job.rows = rows
        except Exception as error:
            self.db.execute("ROLLBACK TO one")
            job.error = error
        self.db.execute("RELEASE one")

    def _append(self, position: int, entry: bytes) -> bool:
        """Put an entry at a position; False where another one is there."""
        if self._monotonic() - self._sure_s > SURE_S:
            self.refresh()  # this process stood still: the log may begin later by now
            if self._at.position >= position:
                return False
        try:
            if self._log.append(position, entry):
                return True
        except Unavailable:
            # It may have arrived all the same, and another thread may have read it.
            if self._arrived == self._expected or self._log.read(position) == entry:
                return True
            raise
        return self._log.read(position) == entry  # the answer to a first attempt may be lost

    def tidy(self) -> None:
        """See `Transactions`: writes a snapshot if the log after the last one is long."""
        newest = self._log.newest_snapshot() or Snapshot(0, 0)
        with self._lock:
            at, sequence = self._at, view.sequence_of(self.db)
        entries, nbytes = at.position - newest.position, at.log_bytes - newest.log_bytes
        if entries >= SNAPSHOT_ENTRIES and nbytes * SNAPSHOT_SHARE >= newest.size_bytes:
            writer = view.SnapshotWriter(self.reading, self.db, at, sequence)
            self._log.write_snapshot(at, writer.pieces())
            _log.info("wrote a snapshot of the catalogue at entry %d", at.position)
        self._log.trim()
