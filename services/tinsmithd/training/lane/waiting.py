"""The calls of one lane that wait, and their bytes."""

import asyncio
from collections import deque
from dataclasses import dataclass

from tinsmithd import tracing
from tinsmithd.training.call import Answer, Call


@dataclass(eq=False)
class QueuedCall:
    """A call in a lane.

    Attributes:
        call: What the client asked.
        answer: What comes of it; the lane fills it in.
        position: Its place in the order, once it is ready.
        written: Done when the call is durable; None where it was before this process began.
        attempts: Number of rank deaths during this call for which it is to blame.
        gap_timer: Runs while the call is parked behind a gap.
        mark: For whom, and since when, it waits.
    """

    call: Call
    answer: Answer
    position: int = 0
    written: "asyncio.Future[None] | None" = None
    attempts: int = 0
    gap_timer: asyncio.TimerHandle | None = None
    mark: tracing.Mark = tracing.NOWHERE

    @property
    def seq_id(self) -> int:
        """The call's number, or 0."""
        return self.call.seq_id


@dataclass
class QueuedBytes:
    """Bytes of the calls that wait in some lanes: those that are ready, those that are parked."""

    ready: int = 0
    parked: int = 0


class Waiting:
    """Calls that are ready, in order, and those that are parked behind a gap, by number.

    Args:
        of_owner: Counts the bytes of all lanes of the owner.

    Attributes:
        ready: To be changed here alone.
        parked: To be changed here alone.
        nbytes: Those of this lane.
    """

    def __init__(self, of_owner: QueuedBytes) -> None:
        self._of_owner = of_owner
        self.nbytes = QueuedBytes()
        self.ready: deque[QueuedCall] = deque()
        self.parked: dict[int, QueuedCall] = {}

    def __len__(self) -> int:
        return len(self.ready) + len(self.parked)

    def push(self, queued: QueuedCall, *, first: bool = False) -> None:
        """A call is ready: behind the others, or before them."""
        self._count_ready(queued.call.nbytes)
        if first:
            self.ready.appendleft(queued)
        else:
            self.ready.append(queued)

    def pop(self) -> QueuedCall:
        """Take the first that is ready."""
        queued = self.ready.popleft()
        self._count_ready(-queued.call.nbytes)
        return queued

    def remove(self, queued: QueuedCall) -> None:
        """Take one that is ready."""
        self.ready.remove(queued)
        self._count_ready(-queued.call.nbytes)

    def park(self, queued: QueuedCall) -> None:
        """A call waits for numbers before its own."""
        self._count_parked(queued.call.nbytes)
        self.parked[queued.seq_id] = queued

    def unpark(self, seq_id: int) -> QueuedCall | None:
        """Take one that is parked, and stop its clock; None where there is none."""
        queued = self.parked.pop(seq_id, None)
        if queued is not None:
            self._count_parked(-queued.call.nbytes)
            if queued.gap_timer is not None:
                queued.gap_timer.cancel()
        return queued

    def clear(self) -> list[QueuedCall]:
        """Take all."""
        found = [self.pop() for _ in range(len(self.ready))]
        found += [self.unpark(seq_id) for seq_id in list(self.parked)]  # type: ignore[misc]
        return found

    def _count_ready(self, nbytes: int) -> None:
        self.nbytes.ready += nbytes
        self._of_owner.ready += nbytes

    def _count_parked(self, nbytes: int) -> None:
        self.nbytes.parked += nbytes
        self._of_owner.parked += nbytes
