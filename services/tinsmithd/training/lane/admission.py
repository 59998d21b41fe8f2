"""What lets calls into a lane: order, bounds, and the journal that each is written to.

The next number becomes ready and is handed to the journal; later ones are parked until the numbers
before them arrive. The lane takes the first that is ready. A call that the journal cannot take is
refused wherever it waits, and its number is free again. A parked call on whose being written down
somebody relies is in the journal, too; from there on it is refused for nothing but the gap.
"""

import asyncio
import functools
from collections.abc import Callable, Mapping, Sequence

from tinsmithd import tracing
from tinsmithd.errors import FailedPrecondition, Reason, ResourceExhausted, TinsmithError
from tinsmithd.training.call import Answer, Call, ComputeWork, Work, kind_of
from tinsmithd.training.journal import (
    AddCall,
    ForgetCalls,
    ParkCall,
    ParkedCall,
    StoredCall,
    UnparkCalls,
)
from tinsmithd.training.lane.context import LaneContext
from tinsmithd.training.lane.waiting import QueuedCall, Waiting

Calls = Sequence[StoredCall]
Parked = Sequence[ParkedCall]


class Admission:
    """The calls of one lane that have not begun, and the order of their numbers.

    Args:
        context: What the lane's parts share.
        refuse: Takes a call out of the lane with an error; its number is free again.

    Attributes:
        next_seq_id: The number that is to take effect next.
    """

    def __init__(
        self, context: LaneContext, refuse: Callable[[QueuedCall, TinsmithError], None]
    ) -> None:
        self._context = context
        self._refuse = refuse
        self._waiting = Waiting(context.queued)
        self._next_position = 1
        self.next_seq_id = 1

    @property
    def parked(self) -> bool:
        """True while calls wait for numbers before theirs."""
        return bool(self._waiting.parked)

    @property
    def ready(self) -> bool:
        """True when there is a call to carry out."""
        return bool(self._waiting.ready)

    @property
    def count(self) -> int:
        """Calls that wait, for whatever reason."""
        return len(self._waiting)

    def take(self) -> QueuedCall:
        """Remove and return the first call that is ready."""
        return self._waiting.pop()

    def put_back(self, queued: QueuedCall) -> None:
        """Make this call the first again."""
        queued.mark = queued.mark.again()
        self._waiting.push(queued, first=True)

    def clear(self) -> list[QueuedCall]:
        """Remove and return all calls that wait."""
        return self._waiting.clear()

    # --- in -----------------------------------------------------------------------------------

    def add(self, call: Call) -> QueuedCall:
        """Take a call in; it is ready at once, or parked behind a gap.

        Raises:
            ResourceExhausted: There is no room (QUEUE_FULL); the number is unused.
        """
        self._check_room(call)
        queued = QueuedCall(call, Answer(kind=kind_of(call.work)), mark=tracing.mark())
        if not call.seq_id:
            self._make_ready(queued)
        else:
            self._park(queued)
            self._admit()
            if call.acknowledge and queued.written is None:
                parked = self._context.journal.commit(self._parking(queued))
                parked.add_done_callback(functools.partial(self._check_parked, queued))
        return queued

    def _check_room(self, call: Call) -> None:
        # The call that the parked ones wait for must always get in, or they would wait for ever.
        waiting, is_next = self._waiting, call.seq_id == self.next_seq_id
        count = 1 + len(waiting.ready) + (0 if is_next else len(waiting.parked))
        nbytes = call.nbytes + waiting.nbytes.ready + (0 if is_next else waiting.nbytes.parked)
        for limit, value, most in (
            ("lane_calls_max", count, self._context.limits.lane_calls_max),
            ("lane_bytes_max", nbytes, self._context.limits.lane_bytes_max),
        ):
            if value > most:
                raise ResourceExhausted(
                    f"too much waits for this model: {limit} is {most}",
                    Reason.QUEUE_FULL,
                    retry_after_s=1.0,
                    metadata={"limit": limit, "value": str(value)},
                )
        self._context.executor.check_room(call.nbytes)
        self._context.admit(call, is_next)

    def _park(self, queued: QueuedCall) -> None:
        self._waiting.park(queued)
        if queued.seq_id != self.next_seq_id:
            loop = asyncio.get_running_loop()
            wait_s = self._context.limits.gap_wait_s_max
            queued.gap_timer = loop.call_later(wait_s, self._end_gap_wait, queued)

    def _parking(self, queued: QueuedCall) -> ParkCall:
        call = queued.call
        return ParkCall(self._context.model_id, call.seq_id, call.digest, call.work)

    def _check_parked(self, queued: QueuedCall, written: "asyncio.Future[None]") -> None:
        """A parked call is written down, or cannot be: its caller hears that now."""
        error = None if written.cancelled() else written.exception()
        if error is None:
            queued.answer.accept()
        elif isinstance(error, TinsmithError) and self._waiting.parked.get(queued.seq_id) is queued:
            self._waiting.unpark(queued.seq_id)
            self._refuse(queued, error)

    def _end_gap_wait(self, queued: QueuedCall) -> None:
        self._waiting.unpark(queued.seq_id)
        error = FailedPrecondition(
            f"seq_id {self.next_seq_id} did not arrive within "
            f"{self._context.limits.gap_wait_s_max:g} s; {queued.seq_id} is unused",
            Reason.SEQ_ID_GAP,
            retry_after_s=0.0,
            metadata={"seq_id": str(queued.seq_id), "next_seq_id": str(self.next_seq_id)},
        )
        if not queued.call.acknowledge:
            self._refuse(queued, error)
            return
        # Its caller must not hear earlier that the number is free, see `Lane._take_back`.
        unpark = UnparkCalls(self._context.model_id, [queued.seq_id])
        forgotten = self._context.journal.commit(unpark, must=True)
        forgotten.add_done_callback(lambda _: self._refuse(queued, error))

    def _admit(self) -> None:
        while (queued := self._waiting.unpark(self.next_seq_id)) is not None:
            self.next_seq_id += 1
            self._make_ready(queued)

    def _make_ready(self, queued: QueuedCall) -> None:
        queued.position = self._next_position
        self._next_position += 1
        call = queued.call
        add = AddCall(self._context.model_id, queued.position, call.seq_id, call.digest, call.work)
        # One that waited may have been accepted, and is not refused for want of room any more.
        must = call.acknowledge and queued.gap_timer is not None
        queued.written = self._context.journal.commit(add, must=must)
        queued.written.add_done_callback(lambda written: self._check_written(queued, written))
        self._context.executor.wrote(queued.position, call.nbytes)
        self._waiting.push(queued)

    def begin_after(self, calls: Calls) -> None:
        """Go on behind the newest calls of a lane, whose others are read when it is used."""
        for call in calls:
            self._next_position = call.position + 1
            if call.seq_id:
                self.next_seq_id = call.seq_id + 1

    def recall(
        self,
        calls: Calls,
        works: Mapping[int, Work],
        parked: Parked,
    ) -> Sequence[QueuedCall]:
        """Go on where an earlier process ended.

        Args:
            calls: What the journal has of this model.
            works: What the calls ask for that have no answer and are still to be made, by position.
            parked: Calls that waited for numbers before their own.

        Returns:
            The calls that wait now.
        """
        orphans = []
        for call in calls:
            self._next_position = call.position + 1
            self._context.executor.wrote(call.position, call.payload_bytes)
            if call.answer_digest is not None:
                if call.seq_id:
                    self.next_seq_id = call.seq_id + 1
            elif call.position not in works:
                continue  # the model is lost, and its calls are not made any more
            elif call.seq_id not in (0, self.next_seq_id):
                orphans.append(call.position)  # the journal never had the call before it
            else:
                queued = QueuedCall(
                    Call(call.seq_id, call.digest, works[call.position]),
                    Answer(kind=kind_of(works[call.position])),
                    position=call.position,
                    attempts=call.attempts,
                )
                queued.answer.accept()
                self.next_seq_id += bool(call.seq_id)
                self._waiting.push(queued)
        if orphans:
            self._context.journal.commit(ForgetCalls(self._context.model_id, orphans), must=True)
        for waited in parked:
            work = waited.work
            nbytes = work.nbytes if isinstance(work, ComputeWork) else 0
            again = Call(waited.seq_id, waited.digest, work, nbytes, acknowledge=True)
            queued = QueuedCall(again, Answer(kind=kind_of(work)))
            queued.answer.accept()
            self._park(queued)
        found = [*self._waiting.ready, *self._waiting.parked.values()]
        self._admit()
        return found

    # --- out again ----------------------------------------------------------------------------

    def free(self, queued: QueuedCall, *, written: bool) -> "asyncio.Future[None] | None":
        """Free a call's number: nothing happened, and what came after waits for it again.

        Args:
            queued: The call, which `take` returned.
            written: Whether the journal has it.

        Returns:
            Done when the journal has forgotten what it has to; None where that is nothing. (On a
            full disk each refused call would else leave a commit behind that waits for room.)
        """
        free = [queued.position] if written else []
        waits: list[QueuedCall] = []
        if queued.seq_id:
            self.next_seq_id = queued.seq_id
            later = [q for q in self._waiting.ready if q.seq_id and q.position > queued.position]
            for waiting in later:
                self._waiting.remove(waiting)
                free.append(waiting.position)
                self._park(waiting)
                if waiting.call.acknowledge:
                    waits.append(waiting)
        self._context.executor.forgot([queued.position, *free])
        if not free:
            return None
        forget = ForgetCalls(self._context.model_id, free)
        parking = [self._parking(waiting) for waiting in waits]
        forgotten = self._context.journal.commit(forget, *parking, must=True)
        for waiting in waits:
            forgotten.add_done_callback(functools.partial(self._check_parked, waiting))
        return forgotten

    def _check_written(self, queued: QueuedCall, written: "asyncio.Future[None]") -> None:
        """Refuse a call that the journal cannot take: it need not wait for its turn to hear it."""
        error = None if written.cancelled() else written.exception()
        if error is None:
            queued.answer.accept()
        elif isinstance(error, TinsmithError) and queued in self._waiting.ready:
            self._waiting.remove(queued)
            self.free(queued, written=False)
            self._refuse(queued, error)
