"""Which ephemeral checkpoints stay: those that are held, and the newest of each model.

A lease has an id that only its holder knows, so that nobody can end a lease of somebody else. One
without an id can only run out.

All of it is in memory. A start grants every lease anew, and the Training server says again which
models are gone. Calls may come from any thread.

Where other servers share the store each has the leases that it granted. It tells the others which
checkpoints are held, once for several leases' time, and none removes what another one said is held.
"""

import logging
import math
import threading
from collections import Counter, deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from tinsmithd.checkpoint.catalogue import Catalogue, Checkpoint, News
from tinsmithd.checkpoint.rules.clocks import Clocks
from tinsmithd.domain import CheckpointPath
from tinsmithd.errors import TinsmithError

HOLD_LEASES = 2.0
"""For how many leases' time a server believes another one that a checkpoint is held."""
TELL_AHEAD_LEASES = 0.5
"""What is told anyway takes along what would have to be told within so many leases' time."""
EXTEND_BELOW = 0.9
"""Share of its time to live below which the next use writes a later end down."""
LEASES_MAX = 100_000
"""Maximum number of leases with ids; one more is a lease that can only run out."""

_log = logging.getLogger(__name__)


@dataclass
class _Held:
    """An ephemeral checkpoint and the ends of its leases, by a clock that nobody sets.

    Attributes:
        until_s: When the last lease without an id ends.
        leases: When each of the others ends, by id.
        told_s: Until when other servers know that it is held.
    """

    number: int
    path: CheckpointPath
    ttl_seconds: int | None
    writer: str
    expire_time_s: float | None
    until_s: float = -math.inf
    leases: dict[str, float] = field(default_factory=dict)
    told_s: float = math.inf

    @property
    def ends_s(self) -> float:
        """When the last of all leases ends."""
        return max(self.until_s, *self.leases.values()) if self.leases else self.until_s

    def is_held(self, now_s: float) -> bool:
        return self.ends_s > now_s


class Leases:
    """The leases on the ephemeral checkpoints of a catalogue.

    Args:
        catalogue: Where they are.
        lease_s: How long a lease lasts.
        clocks: What times to live and leases count in.
        shared: Whether other servers have the same checkpoints.
    """

    def __init__(
        self, catalogue: Catalogue, lease_s: float, clocks: Clocks, *, shared: bool = False
    ) -> None:
        self.lease_s = lease_s
        self._catalogue = catalogue
        self._clocks = clocks
        self._lock = threading.Lock()
        self._held: dict[CheckpointPath, _Held] = {}
        self._named = 0  # leases with ids, of all checkpoints
        self._released: set[str] = set()
        self._shared = shared
        self._untold: set[CheckpointPath] = set()
        self._news: deque[News] = deque()
        if shared:
            catalogue.told.append(self._news.append)
        for checkpoint in catalogue.ephemeral():
            self.grant(checkpoint, told=False)
        self._untold = set()  # nobody was promised any of these leases

    def __len__(self) -> int:
        return len(self._held)

    def grant(self, checkpoint: Checkpoint, lease_id: str = "", *, told: bool = True) -> None:
        """Give the first lease on a checkpoint to its writer; an ordinary one needs none.

        Args:
            checkpoint: Which one.
            lease_id: That of the lease.
            told: Whether other servers were told of the checkpoint by this one: who is takes it
                for held, for longer than one lease.
        """
        with self._lock:
            self._hear()
            held = self._know(checkpoint, told=told)
            if held is not None:
                self._lease(held, lease_id)

    def _know(self, checkpoint: Checkpoint, *, told: bool) -> _Held | None:
        """Note what became of a checkpoint; None where it is not ephemeral, or not any more."""
        about = checkpoint.ephemeral
        before = self._held.pop(checkpoint.path, None)
        if about is None:
            return None
        held = self._held[checkpoint.path] = _Held(
            checkpoint.number,
            checkpoint.path,
            about.ttl_seconds,
            about.writer,
            checkpoint.expire_time_s,
        )
        if self._shared:
            held.told_s = self._clocks.monotonic() + self.lease_s if told else -math.inf
        if before is not None:  # the write was repeated, and others may hold it by now
            held.until_s, held.leases = before.until_s, before.leases
            if before.number == held.number:
                held.told_s = before.told_s
        return held

    def _hear(self) -> None:
        """Take note of what other servers made and removed."""
        gone: set[int] = set()
        while self._news:
            news = self._news.popleft()
            for checkpoint in (*news.made, *news.changed):
                self._know(checkpoint, told=False)
            gone.update(news.removed)
        if gone:
            self._held = {p: held for p, held in self._held.items() if held.number not in gone}

    def renew(self, path: CheckpointPath, lease_id: str = "") -> bool:
        """Renew a lease on use of a checkpoint; False where no ephemeral one is there."""
        with self._lock:
            self._hear()
            held = self._held.get(path)
            if held is None:
                return False
            self._lease(held, lease_id)
            self._extend(held)
            return True

    def end(self, leases: Iterable[tuple[CheckpointPath, str]]) -> None:
        """End leases that holders give back; nothing happens where there is no such lease."""
        with self._lock:
            for path, lease_id in leases:
                held = self._held.get(path)
                if held is not None and held.leases.pop(lease_id, None) is not None:
                    self._named -= 1

    def _lease(self, held: _Held, lease_id: str) -> None:
        until_s = self._clocks.monotonic() + self.lease_s
        if lease_id and (lease_id in held.leases or self._named < LEASES_MAX):
            self._named += lease_id not in held.leases
            held.leases[lease_id] = until_s
        else:
            held.until_s = until_s
        if until_s > held.told_s:
            self._untold.add(held.path)

    def tell(self) -> None:
        """Tell other servers of what is held here, where there are any and they must know.

        Raises:
            Unavailable: The store does not answer (CHECKPOINT_UNAVAILABLE).
        """
        with self._lock:
            if not self._untold:
                return
            now_s = self._clocks.monotonic()
            soon_s = now_s + self.lease_s * (1 + TELL_AHEAD_LEASES)
            telling = [
                held
                for path, held in self._held.items()
                if path in self._untold or (held.is_held(now_s) and held.told_s < soon_s)
            ]
            self._untold = set()
        try:
            self._catalogue.hold([held.number for held in telling])
        except TinsmithError:
            with self._lock:
                self._untold |= {held.path for held in telling}
            raise
        for held in telling:
            held.told_s = now_s + HOLD_LEASES * self.lease_s

    def _extend(self, held: _Held) -> None:
        """Count the time to live from this use; `EXTEND_BELOW` saves most of the writes."""
        if held.ttl_seconds is None or held.expire_time_s is None:
            return
        now_s = self._clocks.wall()
        if held.expire_time_s - now_s < held.ttl_seconds * EXTEND_BELOW:
            expire_time_s = now_s + held.ttl_seconds
            try:
                self._catalogue.extend(held.number, expire_time_s)
            except TinsmithError as error:  # reading goes on, on a full disk too
                _log.warning("%s: its life is not extended yet: %s", held.path, error)
            else:
                held.expire_time_s = expire_time_s

    def release(self, model_ids: Collection[str]) -> None:
        """Note that models are gone: their newest checkpoints need a lease like others."""
        with self._lock:
            self._hear()
            known = {path.model_id for path in self._held}
            self._released |= known.intersection(model_ids)

    def kept_models(self, writer: str) -> Sequence[str]:
        """Models of a writer that have ephemeral checkpoints and were not released."""
        with self._lock:
            self._hear()
            found = {h.path.model_id for h in self._held.values() if h.writer == writer}
            return sorted(found - self._released)

    def reclaim(self) -> int:
        """Remove what nobody holds and no model needs; returns how many.

        Whoever asks for one of these meanwhile waits, and then it is gone.
        """
        with self._lock:
            self._hear()
            if not self._due():
                return 0
            # Some may have been deleted, and must not count as the newest.
            self._keep_present()
            due = self._due()
            removed = self._catalogue.delete_ephemeral([held.number for held in due])
            # Those that another server said are held are still there.
            there = self._catalogue.present([held.number for held in due]) if self._shared else ()
            for held in due:
                if held.number not in there:
                    del self._held[held.path]
            self._released &= {path.model_id for path in self._held}
            return removed

    def forget_deleted(self) -> None:
        """Drop what is held of checkpoints that were deleted, or expired."""
        with self._lock:
            self._hear()
            self._keep_present()

    def _keep_present(self) -> None:
        there = self._catalogue.present([held.number for held in self._held.values()])
        self._held = {p: held for p, held in self._held.items() if held.number in there}

    def _due(self) -> list[_Held]:
        now_s = self._clocks.monotonic()
        newest: Counter[str] = Counter()
        self._named = 0
        for held in self._held.values():
            model_id = held.path.model_id
            newest[model_id] = max(newest[model_id], held.number)
            held.leases = {key: until for key, until in held.leases.items() if until > now_s}
            self._named += len(held.leases)
        due = [
            held
            for path, held in self._held.items()
            if not held.is_held(now_s)
            and (held.number < newest[path.model_id] or path.model_id in self._released)
        ]
        elsewhere = self._catalogue.held_elsewhere([held.number for held in due])
        return [held for held in due if held.number not in elsewhere]
