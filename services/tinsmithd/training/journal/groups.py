"""What waits to be written, in groups that become one commit each: shared between owners.

Whoever hands in much makes nobody else wait for more than a group: each group has something of
every owner that waits, by turns, until it is as large as a commit may be. Of one owner things are
written in the order in which they came; of two owners nothing hangs on it.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence

from tinsmithd import tracing
from tinsmithd.owners import owner_of
from tinsmithd.training.call import ComputeWork
from tinsmithd.training.journal.records import AddAnswer, AddCall, ParkCall, Write

GROUP_BYTES = 4 * 1024 * 1024
"""A group takes no more once it has so many: a commit of some tens of milliseconds."""
HANDED_BYTES = 64 * 1024
"""What writes count beside their data: 64 of them without any are a group. Two groups are what a
light call waits for beside a heavy owner, and a commit of each call is dear only where it is all
that comes."""


def nbytes_of(write: Write) -> int:
    """Roughly the bytes that a write adds to the log, besides a few pages."""
    if isinstance(write, AddCall | ParkCall) and isinstance(write.work, ComputeWork):
        return write.work.nbytes
    return sum(map(len, write.answer.outputs)) if isinstance(write, AddAnswer) else 0


def _new_future() -> "asyncio.Future[None]":
    return asyncio.get_running_loop().create_future()


class Handed:
    """Some writes that belong into one commit; with `must` they are tried until they succeed.

    Attributes:
        done: For whoever handed them in, who may cancel it.
        mark: For whom, and since when, they wait.
        owner: Whose they are; empty for nobody's.
        nbytes: What they count in a group.
    """

    __slots__ = ("_settled", "done", "mark", "must", "nbytes", "owner", "writes")

    def __init__(self, writes: Sequence[Write], must: bool) -> None:
        self.writes, self.must = writes, must
        self.done = _new_future()
        self.mark = tracing.mark()
        model_id: str = getattr(writes[0], "model_id", "") if writes else ""
        self.owner = owner_of(model_id) if model_id else ""
        self.nbytes = HANDED_BYTES + sum(map(nbytes_of, writes))
        self._settled: asyncio.Future[None] | None = None

    @property
    def settled(self) -> "asyncio.Future[None]":
        """Done when they are written, or given up, whether or not anybody cancelled `done`."""
        if self._settled is None:
            self._settled = _new_future()
        return self._settled

    def end(self, error: Exception | None = None) -> None:
        """They are written, or will not be."""
        if not self.done.done():
            if error is None:
                self.done.set_result(None)
            else:
                self.done.set_exception(error)
                self.done.exception()  # the caller may be gone, and then nobody has to hear of it
        if self._settled is not None and not self._settled.done():
            self._settled.set_result(None)


class Groups:
    """Hands out groups, O(1) for each that is in one. Lives on one event loop."""

    def __init__(self) -> None:
        # By owner, the one that waits longest for a turn first.
        self._queues: OrderedDict[str, deque[Handed]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._queues)

    def __iter__(self) -> Iterator[Handed]:
        for queue in self._queues.values():
            yield from queue

    def add(self, handed: Handed) -> None:
        """Something waits, behind what waits of the same owner."""
        self._queues.setdefault(handed.owner, deque()).append(handed)

    def put_back(self, group: Sequence[Handed]) -> None:
        """What was taken waits again, before what came since then."""
        for handed in reversed(group):
            self._queues.setdefault(handed.owner, deque()).appendleft(handed)

    def take(self) -> list[Handed]:
        """The next group; empty where nothing waits."""
        group: list[Handed] = []
        nbytes = 0
        while self._queues and nbytes < GROUP_BYTES:
            owner, queue = next(iter(self._queues.items()))
            handed = queue.popleft()
            self._queues.move_to_end(owner)
            if not queue:
                del self._queues[owner]
            group.append(handed)
            nbytes += handed.nbytes
        return group

    def keep_only(self, stays: Callable[[Handed], bool]) -> Sequence[Handed]:
        """Take out, and return, what does not stay."""
        gone = [handed for handed in self if not stays(handed)]
        kept = [handed for handed in self if stays(handed)]
        self.clear()
        for handed in kept:
            self.add(handed)
        return gone

    def clear(self) -> None:
        """Nothing waits any more."""
        self._queues.clear()
