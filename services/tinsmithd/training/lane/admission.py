"""What waits in one lane: calls in the order of their numbers, written down as they come.

The next number becomes ready and is handed to the journal; later ones are parked until the numbers
before them arrived. Whoever carries calls out takes the first that is ready. A call that cannot be
written down is refused wherever it waits, and its number is free again.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tinsmithd.errors import FailedPrecondition, Reason, ResourceExhausted, TinsmithError
from tinsmithd.training.call.answer import Answer, Answers
from tinsmithd.training.call.work import Work
from tinsmithd.training.journal.journal import Journal
from tinsmithd.training.journal.records import AddCall, ForgetCalls, StoredCall
from tinsmithd.training.lane.interface import Call, LaneLimits, Rules


@dataclass(eq=False)
class Entry:
    """A call in a lane.

    Attributes:
        position: Its place in the order, once it is ready.
        written: Done when the call is durable; None where it was before this process began.
        attempts: How often the ranks died during it and it was to blame.
    """

    seq_id: int
    call: Call
    answer: Answer = field(default_factory=Answer)
    position: int = 0
    written: "asyncio.Future[None] | None" = None
    attempts: int = 0
    gap_timer: asyncio.TimerHandle | None = None


class Waiting:
    """The calls of one lane that were not begun, and the answers of all.

    Args:
        name: The model's id.
        limits: Its bounds.
        journal: Where calls are written down.
        rules: Told how many bytes the journal holds.

    Attributes:
        answers: Of the numbered calls, by number.
    """

    def __init__(self, name: str, limits: LaneLimits, journal: Journal, rules: Rules) -> None:
        self._name = name
        self._limits = limits
        self._journal = journal
        self._rules = rules
        self.answers = Answers(limits.answers_kept_max, limits.answer_bytes_kept_max)
        self._parked: dict[int, Entry] = {}
        self._ready: deque[Entry] = deque()
        self._next_position = 1

    @property
    def parked(self) -> bool:
        """True while calls wait for numbers before theirs."""
        return bool(self._parked)

    @property
    def ready(self) -> bool:
        """True when there is a call to carry out."""
        return bool(self._ready)

    @property
    def count(self) -> int:
        """Calls that wait, for whatever reason."""
        return len(self._ready) + len(self._parked)

    def take(self) -> Entry:
        """The first that is ready."""
        return self._ready.popleft()

    def put_back(self, entry: Entry) -> None:
        """It is the first again."""
        self._ready.appendleft(entry)

    def clear(self) -> list[Entry]:
        """All that waits, which waits no longer."""
        found = [*self._ready, *self._parked.values()]
        self._ready.clear()
        self._parked.clear()
        for entry in found:
            if entry.gap_timer is not None:
                entry.gap_timer.cancel()
        return found

    # --- in -----------------------------------------------------------------------------------

    def add(self, seq_id: int, call: Call) -> Answer:
        """Take a call in; its answer comes when its turn came.

        Raises:
            ResourceExhausted: There is no room (QUEUE_FULL); the number is unused.
        """
        self._check_room(seq_id, call)
        entry = Entry(seq_id, call)
        if not seq_id:
            self._make_ready(entry)
        else:
            self.answers.record(seq_id, call.digest, entry.answer)
            self._park(entry)
            self._admit()
        return entry.answer

    def _check_room(self, seq_id: int, call: Call) -> None:
        # The call that the parked ones wait for must always get in, or they would wait for ever.
        waiting = list(self._ready)
        if seq_id != self.answers.next_seq_id:
            waiting += self._parked.values()
        nbytes = call.nbytes + sum(entry.call.nbytes for entry in waiting)
        for limit, value, most in (
            ("lane_calls_max", len(waiting) + 1, self._limits.lane_calls_max),
            ("lane_bytes_max", nbytes, self._limits.lane_bytes_max),
        ):
            if value > most:
                raise ResourceExhausted(
                    f"too much waits for this model: {limit} is {most}",
                    Reason.QUEUE_FULL,
                    retry_after_s=1.0,
                    metadata={"limit": limit, "value": str(value)},
                )
        self._rules.check_room(call.nbytes)

    def _park(self, entry: Entry) -> None:
        self._parked[entry.seq_id] = entry
        if entry.seq_id != self.answers.next_seq_id:
            loop = asyncio.get_running_loop()
            entry.gap_timer = loop.call_later(self._limits.gap_wait_s_max, self._gap, entry)

    def _gap(self, entry: Entry) -> None:
        del self._parked[entry.seq_id]
        self.answers.forget(entry.seq_id)
        entry.answer.fail(
            FailedPrecondition(
                f"seq_id {self.answers.next_seq_id} did not arrive within "
                f"{self._limits.gap_wait_s_max:g} s; {entry.seq_id} is unused",
                Reason.SEQ_ID_GAP,
                retry_after_s=0.0,
                metadata={
                    "seq_id": str(entry.seq_id),
                    "next_seq_id": str(self.answers.next_seq_id),
                },
            )
        )

    def _admit(self) -> None:
        while (entry := self._parked.pop(self.answers.next_seq_id, None)) is not None:
            if entry.gap_timer is not None:
                entry.gap_timer.cancel()
            self.answers.next_seq_id += 1
            self._make_ready(entry)

    def _make_ready(self, entry: Entry) -> None:
        entry.position = self._next_position
        self._next_position += 1
        call = entry.call
        if entry.seq_id:
            self.answers.record(entry.seq_id, call.digest, entry.answer, entry.position)
        entry.written = self._journal.commit(
            AddCall(self._name, entry.position, entry.seq_id, call.digest, call.work)
        )
        entry.written.add_done_callback(lambda written: self._refuse(entry, written))
        self._rules.wrote(entry.position, call.nbytes)
        self._ready.append(entry)

    def recall(
        self,
        calls: Sequence[StoredCall],
        works: Mapping[int, Work],
        read: Callable[[int], Callable[[], Any]],
    ) -> None:
        """Go on where an earlier process ended.

        Args:
            calls: What the journal has of this model.
            works: Payloads of the calls without answer that are still to be made, by position.
            read: Makes what reads the answer of a position.
        """
        orphans = []
        for call in calls:
            self._next_position = call.position + 1
            self._rules.wrote(call.position, call.payload_bytes)
            if call.result_digest is not None:
                if call.seq_id:
                    self.answers.next_seq_id = call.seq_id + 1
                if call.seq_id and call.answer_bytes:
                    answer = Answer(read(call.position))
                    self.answers.restore(
                        call.seq_id, call.digest, answer, call.position, call.answer_bytes
                    )
            elif call.position not in works:
                continue  # the model is lost, and what waited for it is not made any more
            elif call.seq_id not in (0, self.answers.next_seq_id):
                orphans.append(call.position)  # what it followed was never written down
            else:
                entry = Entry(call.seq_id, Call(call.digest, works[call.position]))
                entry.position, entry.attempts = call.position, call.attempts
                if call.seq_id:
                    self.answers.next_seq_id += 1
                    self.answers.record(call.seq_id, call.digest, entry.answer, call.position)
                self._ready.append(entry)
        if orphans:
            self._journal.commit(ForgetCalls(self._name, orphans), must=True)

    # --- out again ----------------------------------------------------------------------------

    async def take_back(self, entry: Entry, error: TinsmithError, *, written: bool) -> None:
        """Nothing happened and the number is free: what came after has to wait for it again.

        Args:
            entry: The call, taken before.
            error: What its caller hears.
            written: It is in the journal.
        """
        forgotten = self._free(entry, written=written)
        if written and forgotten is not None:
            # Before that the caller may not hear that the number is free: it could be used for
            # something else, and after a restart this call would be there again.
            await forgotten
        entry.answer.fail(error)

    def _refuse(self, entry: Entry, written: "asyncio.Future[None]") -> None:
        """A call that cannot be written down need not wait for its turn to hear of it."""
        error = None if written.cancelled() else written.exception()
        if isinstance(error, TinsmithError) and entry in self._ready:
            self._ready.remove(entry)
            self._free(entry, written=False)
            entry.answer.fail(error)

    def _free(self, entry: Entry, *, written: bool) -> "asyncio.Future[None] | None":
        """Free a call's number, and park what came after.

        Returns:
            Done when the journal has it so; None where it has nothing to forget. On a full disk
            each refused call would else leave a commit behind that waits for room.
        """
        free = [entry.position] if written else []
        if entry.seq_id:
            self.answers.forget(entry.seq_id)
            self.answers.next_seq_id = entry.seq_id
            later = [e for e in self._ready if e.seq_id and e.position > entry.position]
            for waiting in later:
                self._ready.remove(waiting)
                free.append(waiting.position)
                self._park(waiting)
        self._rules.forgot([entry.position, *free])
        if not free:
            return None
        return self._journal.commit(ForgetCalls(self._name, free), must=True)
