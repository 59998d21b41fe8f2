"""Which processes are a rank group, and whether all of them live: rules over a key-value store.

Whoever started a rank notices when its process dies, and so do the ranks that wait for it (the
connection breaks). Nobody notices a node that vanished without a word, or a process that stands
still: the others would wait in their next collective for ever. A short timeout of collectives does
not help, since a rank may rightly compute for minutes while another waits. So every rank says in
the store every few seconds that it lives, from a thread that goes on while the main thread computes
or waits, and ends its process when another rank falls silent.
"""

import dataclasses
import hashlib
import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tinsmithd.trainer.process_group.stall import AwakeClock

INTERVAL_S_MAX = 2.0
"""Maximum seconds between two beats of a rank; a short timeout makes them come faster."""
BEATS_PER_TIMEOUT = 6
POLL_S = 0.05
FAREWELL_S_MAX = 1.0
"""Maximum seconds that an orderly end waits for the others to read of it."""
_LEFT = b"left"

EXIT_GROUP_LOST = 75
"""Exit status of a rank whose group is no more: start the group again (EX_TEMPFAIL)."""
EXIT_RANK_SILENT = 76
"""The same, where a rank gave no sign of life; its last command may be the reason."""

_log = logging.getLogger(__name__)


class Store(Protocol):
    """The methods of a `torch.distributed.Store` that are used here; reads may block."""

    def set(self, key: str, value: str) -> None:
        """Write a value."""

    def get(self, key: str) -> bytes:
        """Read a value; blocks until there is one."""

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Read several."""

    def check(self, keys: list[str]) -> bool:
        """Whether all of these keys have values."""


@dataclass(frozen=True)
class Member:
    """One process of a rank group.

    Attributes:
        node: Name of its node.
        pid: Its process id on that node.
        nonce: Distinguishes it from the process that had its rank before.
    """

    node: str
    pid: int
    nonce: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class Group:
    """The processes that are one group.

    Attributes:
        id: Unique; prefix of the group's keys in the store.
        members: By rank.
    """

    id: str
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Loss:
    """Why a rank group is no more.

    Attributes:
        message: For the log.
        silent: Ranks that fell silent although nobody said goodbye.
        orderly: Whether a rank was ended on purpose, so that nothing is wrong.
    """

    message: str
    silent: tuple[int, ...] = ()
    orderly: bool = False


class MeetError(Exception):
    """Not all ranks came in time; the message says who is missing."""


def meet(store: Store, rank: int, world_size: int, me: Member, *, timeout_s: float) -> Group:
    """Agree with the other ranks on who is in the group.

    The store may outlive groups (torchrun keeps it between restarts) and still hold what earlier
    groups wrote. So rank 0 proposes the processes that it sees, and a proposal holds once every
    process in it has answered.

    Args:
        store: Shared by the ranks.
        rank: Number of this rank.
        world_size: Number of ranks.
        me: This process.
        timeout_s: Maximum seconds between the arrivals of two ranks.

    Raises:
        MeetError: A rank is missing.
    """
    deadline_s = time.monotonic() + timeout_s
    own = json.dumps(dataclasses.asdict(me))
    arrivals = [f"tinsmith/arrived/{r}" for r in range(world_size)]
    store.set(arrivals[rank], own)
    proposed = ""
    while True:
        if rank == 0:
            present = [store.check([key]) for key in arrivals]
            if all(present):
                proposal = json.dumps([json.loads(text) for text in store.multi_get(arrivals)])
                if proposal != proposed:
                    store.set("tinsmith/group", proposal)
                    proposed = proposal
        elif store.check(["tinsmith/group"]):
            proposed = store.get("tinsmith/group").decode()
        group = _group(proposed) if proposed else None
        if group is not None and group.members[rank : rank + 1] == (me,):
            # The answer is the first beat: from now on the others notice when this rank is silent.
            store.set(_beat_key(group, rank), "0")
            complete = f"{group.id}/complete"
            if rank == 0 and store.check([_beat_key(group, r) for r in range(world_size)]):
                store.set(complete, "1")
            if store.check([complete]):
                return group
        if time.monotonic() > deadline_s:
            raise MeetError(_missing(store, arrivals, group, timeout_s))
        time.sleep(POLL_S)


def _group(proposal: str) -> Group:
    members = tuple(Member(**fields) for fields in json.loads(proposal))
    digest = hashlib.blake2s(proposal.encode(), digest_size=8).hexdigest()
    return Group(f"tinsmith/{digest}", members)


def _beat_key(group: Group, rank: int) -> str:
    return f"{group.id}/beat/{rank}"


def _missing(store: Store, arrivals: Sequence[str], group: Group | None, timeout_s: float) -> str:
    ranks = range(len(arrivals))
    missing = [r for r in ranks if not store.check([arrivals[r]])]
    if not missing and group is not None:
        missing = [r for r in ranks if not store.check([_beat_key(group, r)])]
    who = f"ranks {', '.join(map(str, missing))}" if missing else "rank 0"
    return f"waited {timeout_s:g} s for the other ranks; no sign of {who}"


class Heartbeat:
    """Says that this rank lives, and watches the others; `start`, then `leave` and `close`.

    One thread talks with the store. Another, which never waits for the store, judges by what the
    first one heard. Time counts only while this process runs: one that was itself suspended (a
    laptop, a debugger) hears the others before it calls them silent.

    Attributes:
        interval_s: Seconds between two beats.
    """

    def __init__(
        self,
        store: Store,
        group: Group,
        rank: int,
        *,
        timeout_s: float,
        on_loss: Callable[[Loss], None],
        report: Callable[[], str] = str,
        store_rank: int | None = None,
    ) -> None:
        """Prepare.

        Args:
            store: A connection that nobody else uses.
            group: As `meet` returned it.
            rank: Number of this rank.
            timeout_s: Maximum seconds of a rank's silence.
            on_loss: Ends the process; called once, from a thread, unless this rank left first.
            report: What else this rank's beats tell the others; see `reports`.
            store_rank: The rank whose process serves the store, so that a store which does not
                answer means a silent rank; None where no rank of the group serves it.
        """
        self._store_rank = store_rank
        self._store = store
        self._timeout_s = timeout_s
        self.interval_s = min(INTERVAL_S_MAX, timeout_s / BEATS_PER_TIMEOUT)
        self._own_key = _beat_key(group, rank)
        self._others = [r for r in range(len(group.members)) if r != rank]
        self._keys = [_beat_key(group, r) for r in self._others]
        self._on_loss = on_loss
        self._report = report
        self._lock = threading.Lock()
        self._lost = False
        self._awake_s = 0.0
        self._answered_s = 0.0
        self._heard_s = dict.fromkeys(self._others, 0.0)
        self._values = dict.fromkeys(self._others, b"")
        self._leaving = False
        self._said_goodbye = threading.Event()
        self._talk_now = threading.Event()
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=work, name=f"heartbeat-{name}", daemon=True)
            for name, work in (("talk", self._talk), ("watch", self._watch))
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def leave(self) -> None:
        """Say goodbye, since this rank ends on purpose; it still watches the others."""
        self._leaving = True
        self._talk_now.set()
        self._said_goodbye.wait(FAREWELL_S_MAX)

    def close(self) -> None:
        """End the threads, unless the store blocks them."""
        self._leaving = True
        self._closed.set()
        self._talk_now.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(FAREWELL_S_MAX)

    def reports(self) -> Mapping[int, str]:
        """What the others' last beats told; empty of a rank that says goodbye."""
        with self._lock:
            return {rank: value.decode().partition(" ")[2] for rank, value in self._values.items()}

    def rank_that_left(self) -> int | None:
        """A rank that said goodbye; waits as long as such news may take, None where none comes."""
        deadline_s = time.monotonic() + 2 * self.interval_s
        while True:
            self._talk_now.set()
            with self._lock:
                left = [r for r in self._others if self._values[r] == _LEFT]
            if left or time.monotonic() > deadline_s:
                return left[0] if left else None
            time.sleep(POLL_S)

    def _talk(self) -> None:
        count = 0
        try:
            while not self._closed.is_set():
                self._talk_now.clear()
                count += 1
                leaving = self._leaving
                beat = _LEFT.decode() if leaving else f"{count} {self._report()}"
                self._store.set(self._own_key, beat)
                if leaving:
                    self._said_goodbye.set()
                self._hear(self._store.multi_get(self._keys))
                if leaving and all(value == _LEFT for value in self._values.values()):
                    return  # nothing more to say: the store may go now
                self._talk_now.wait(self.interval_s)
        except Exception as error:
            if not self._leaving:
                reason = str(error).partition("\n")[0]
                self._lose(Loss(f"the store of the rank group is gone ({reason})"))

    def _hear(self, values: Sequence[bytes]) -> None:
        with self._lock:
            self._answered_s = self._awake_s
            for rank, value in zip(self._others, values, strict=True):
                if value != self._values[rank]:
                    self._values[rank] = value
                    self._heard_s[rank] = self._awake_s

    def _watch(self) -> None:
        clock = AwakeClock(self.interval_s)
        while not self._closed.wait(self.interval_s / 2):
            with self._lock:
                self._awake_s = clock.read()
                loss = self._judge()
            if loss is not None:
                self._lose(loss)
                return

    def _judge(self) -> Loss | None:
        """Find what is wrong in what was heard so far; the caller holds the lock."""
        unanswered_s = self._awake_s - self._answered_s
        if unanswered_s > self._timeout_s and not self._leaving:
            if self._store_rank in self._others:
                return _silence([self._store_rank], unanswered_s)
            return Loss(f"the store of the rank group has not answered for {unanswered_s:.1f} s")
        silent = [
            rank
            for rank in self._others
            if self._answered_s - self._heard_s[rank] > self._timeout_s
        ]
        if not silent:
            return None
        first = silent[0]
        silence_s = self._answered_s - self._heard_s[first]
        if any(self._values[rank] == _LEFT for rank in silent):
            return Loss(f"rank {first} was ended {silence_s:.0f} s ago", orderly=True)
        return _silence(silent, silence_s)

    def _lose(self, loss: Loss) -> None:
        with self._lock:
            if self._lost or self._closed.is_set():
                return
            self._lost = True
        self._on_loss(loss)


def _silence(ranks: Sequence[int], silence_s: float) -> Loss:
    names = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    message = f"{names} gave no sign of life for {silence_s:.1f} s"
    return Loss(message, silent=tuple(ranks))
