"""One ordered lane per model: numbers in, effects in order, one at a time per lane.

A lane admits calls by `seq_id`: the next number becomes ready, later ones are parked until the
numbers before them arrived. What is ready is written to the journal, and carried out once it is
durable; what it answers is recorded before anybody hears it. Lanes share the trainer by `Turns`: a
call takes one turn, or one for each of its parts, so that a lane with a long queue or large calls
delays another by one part at most.

When the ranks die the lane brings its model back (`Rules.restore`) and goes on with the call that
was under way; its callers just wait.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tinsmithd import failpoints
from tinsmithd.errors import (
    DataLoss,
    FailedPrecondition,
    Internal,
    Reason,
    ResourceExhausted,
    TinsmithError,
    Unavailable,
)
from tinsmithd.training.answers import Answer, Answers
from tinsmithd.training.journal import Journal
from tinsmithd.training.records import (
    AddCall,
    AddResult,
    CountAttempt,
    DropAnswers,
    Fenced,
    ForgetCalls,
    LoseModel,
    StoredCall,
    Write,
)
from tinsmithd.training.rules import (
    Call,
    LaneLimits,
    Rules,
    model_lost,
    shutting_down,
)
from tinsmithd.training.trainer import ModelBroken, TrainerLost
from tinsmithd.training.turns import Turns
from tinsmithd.training.works import Outcome, RefusedWork, Work

BROKEN_PAUSE_S = 1.0
"""Between two tries to bring a model back that the ranks could not hold."""

_log = logging.getLogger(__name__)


@dataclass
class _Entry:
    seq_id: int
    call: Call
    answer: Answer = field(default_factory=Answer)
    position: int = 0
    written: "asyncio.Future[None] | None" = None
    attempts: int = 0
    gap_timer: asyncio.TimerHandle | None = None


class Lane:
    """The ordered calls of one model.

    Args:
        name: The model's id.
        limits: Its bounds.
        turns: Shared with all lanes.
        journal: Where calls and answers are written down.
        rules: What the calls mean.
    """

    def __init__(
        self, name: str, limits: LaneLimits, turns: Turns, journal: Journal, rules: Rules
    ) -> None:
        self._name = name
        self._limits = limits
        self._turns = turns
        self._journal = journal
        self._rules = rules
        self._answers = Answers(limits.answers_kept_max, limits.answer_bytes_kept_max)
        self._parked: dict[int, _Entry] = {}
        self._ready: deque[_Entry] = deque()
        self._recording = 0
        self._next_position = 1
        self._losses = self._restored_losses = 0
        self._runner: asyncio.Task[None] | None = None
        self._under_way: _Entry | None = None
        self._ended = asyncio.Event()
        self._ended.set()
        self._closed: TinsmithError | None = None
        self._blocked: TinsmithError | None = None

    @property
    def rules(self) -> Rules:
        """What its calls mean."""
        return self._rules

    @property
    def next_seq_id(self) -> int:
        """The number that the next new call should carry."""
        return self._answers.next_seq_id

    @property
    def lost(self) -> bool:
        """True when the model's state is gone."""
        return isinstance(self._closed, DataLoss)

    @property
    def recovering(self) -> bool:
        """True while the ranks do not have the model's state."""
        return self._closed is None and self._losses != self._restored_losses

    @property
    def idle(self) -> bool:
        """True when nothing waits and nothing runs."""
        return self._runner is None and not self._parked and not self._recording

    # --- calls come in ------------------------------------------------------------------------

    def submit(self, seq_id: int, call: Call) -> Answer:
        """Take a call in; its answer comes when its turn came.

        Raises:
            AlreadyExists, FailedPrecondition: See `Answers.find`.
            ResourceExhausted: The lane is full (QUEUE_FULL); the number is unused.
            DataLoss, NotFound: The model is lost or deleted.
        """
        if seq_id:
            answer = self._answers.find(seq_id, call.digest)
            if answer is not None:
                return answer
        refusal = self._closed or self._blocked
        if refusal is not None:
            raise refusal
        self._check_room(seq_id, call)
        entry = _Entry(seq_id, call)
        if not seq_id:
            self._make_ready(entry)
        else:
            self._answers.record(seq_id, call.digest, entry.answer)
            self._park(entry)
            self._admit()
        self._start()
        return entry.answer

    def _check_room(self, seq_id: int, call: Call) -> None:
        # The call that the parked ones wait for must always get in, or they would wait for ever.
        waiting = list(self._ready)
        if seq_id != self._answers.next_seq_id:
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

    def _park(self, entry: _Entry) -> None:
        self._parked[entry.seq_id] = entry
        if entry.seq_id != self._answers.next_seq_id:
            loop = asyncio.get_running_loop()
            entry.gap_timer = loop.call_later(self._limits.gap_wait_s_max, self._gap, entry)

    def _gap(self, entry: _Entry) -> None:
        del self._parked[entry.seq_id]
        self._answers.forget(entry.seq_id)
        entry.answer.fail(
            FailedPrecondition(
                f"seq_id {self._answers.next_seq_id} did not arrive within "
                f"{self._limits.gap_wait_s_max:g} s; {entry.seq_id} is unused",
                Reason.SEQ_ID_GAP,
                metadata={
                    "seq_id": str(entry.seq_id),
                    "next_seq_id": str(self._answers.next_seq_id),
                },
            )
        )

    def _admit(self) -> None:
        while (entry := self._parked.pop(self._answers.next_seq_id, None)) is not None:
            if entry.gap_timer is not None:
                entry.gap_timer.cancel()
            self._answers.next_seq_id += 1
            self._make_ready(entry)

    def _make_ready(self, entry: _Entry) -> None:
        entry.position = self._next_position
        self._next_position += 1
        call = entry.call
        if entry.seq_id:
            self._answers.record(entry.seq_id, call.digest, entry.answer, entry.position)
        entry.written = self._journal.commit(
            AddCall(self._name, entry.position, entry.seq_id, call.digest, call.work)
        )
        self._rules.wrote(entry.position, call.nbytes)
        self._ready.append(entry)

    def recall(
        self,
        calls: Sequence[StoredCall],
        works: Mapping[int, Work],
        read: Callable[[int], Callable[[], Any]],
    ) -> None:
        """Go on where an earlier process ended; `lose_trainer` comes next.

        Args:
            calls: What the journal has of this model.
            works: Payloads of the calls without answer, by position.
            read: Makes what reads the answer of a position.
        """
        orphans = []
        for call in calls:
            self._next_position = call.position + 1
            self._rules.wrote(call.position, call.payload_bytes)
            if call.result_digest is not None:
                if call.seq_id:
                    self._answers.next_seq_id = call.seq_id + 1
                if call.seq_id and call.answer_bytes:
                    answer = Answer(read(call.position))
                    self._answers.restore(
                        call.seq_id, call.digest, answer, call.position, call.answer_bytes
                    )
            elif self._closed is not None:
                continue  # the model is lost, and what waited for it is not made any more
            elif call.seq_id not in (0, self._answers.next_seq_id):
                orphans.append(call.position)  # what it followed was never written down
            else:
                entry = _Entry(call.seq_id, Call(call.digest, works[call.position]))
                entry.position, entry.attempts = call.position, call.attempts
                if call.seq_id:
                    self._answers.next_seq_id += 1
                    self._answers.record(call.seq_id, call.digest, entry.answer, call.position)
                self._ready.append(entry)
        if orphans:
            self._journal.commit(ForgetCalls(self._name, orphans), must=True)

    # --- calls are carried out ----------------------------------------------------------------

    def lose_trainer(self) -> None:
        """The ranks do not have the model's state any more."""
        self._losses += 1
        self._start()

    def _start(self) -> None:
        if self._runner is None and self._closed is None and (self._ready or self.recovering):
            self._ended.clear()
            self._runner = asyncio.create_task(self._run(), name=f"lane {self._name}")

    async def _run(self) -> None:
        try:
            while self._closed is None and (self._ready or self.recovering):
                if self.recovering:
                    await self._restore()
                else:
                    self._under_way = self._ready.popleft()
                    await self._apply(self._under_way)
                    self._under_way = None
        except Fenced:
            # This process ends; what is written belongs to another one, and so does the model.
            self._give_up(shutting_down())
        except Exception:
            _log.exception("the lane of model %s ended", self._name)
            self._give_up(Internal())
        finally:
            self._runner = None
            self._ended.set()

    async def _restore(self) -> None:
        losses = self._losses
        try:
            await self._rules.restore(self._turn)
        except DataLoss as error:
            _log.error("model %s is lost: %s", self._name, error)
            # Not before it is written: a process that was replaced finds things gone, too.
            await self._journal.commit(LoseModel(self._name, error.message), must=True)
            self.close(error)
        except TrainerLost as error:
            _log.warning("model %s has to be brought back again: %s", self._name, error)
        except ModelBroken as error:
            _log.error("model %s could not be brought back yet: %s", self._name, error)
            await asyncio.sleep(BROKEN_PAUSE_S)
        except TinsmithError as error:
            if self._closed is None:
                _log.error("model %s could not be brought back yet: %s", self._name, error)
                self._blocked = error if isinstance(error, Unavailable) else None
                await asyncio.sleep(BROKEN_PAUSE_S)
        else:
            self._restored_losses = losses
            self._blocked = None

    @contextlib.asynccontextmanager
    async def _turn(self, tokens: int) -> AsyncIterator[None]:
        async with self._turns.take(self._name, tokens):
            # While it waited the model may have been deleted, or lost with its trainer.
            if self._closed is not None:
                raise self._closed
            yield

    async def _apply(self, entry: _Entry) -> None:
        work = entry.call.work
        try:
            if entry.written is not None:
                await entry.written
        except TinsmithError as error:  # there is no room to write it down
            await self._take_back(entry, error, written=False)
            return
        failpoints.hit("enqueue")
        if isinstance(work, RefusedWork):
            self._settle(entry, Outcome(error=work.error))
            return
        if self.recovering:  # other ranks came while it was written down
            self._ready.appendleft(entry)
            return
        try:
            done = await self._rules.execute(
                entry.position, entry.seq_id, work, lambda part: self._emit(entry, part), self._turn
            )
        except (Unavailable, ResourceExhausted) as error:
            await self._take_back(entry, error)
        except TinsmithError as error:
            if self._closed is not None:  # nothing is recorded of a model that is gone
                entry.answer.fail(error)
            else:
                self._settle(entry, Outcome(error=error))
        except TrainerLost as error:
            await self._again(entry, str(error), blamed=error.blamed)
        except ModelBroken as error:
            await self._again(entry, str(error), blamed=True)
        except Exception:
            _log.exception("a call of model %s failed", self._name)
            self._settle(entry, Outcome(error=Internal()))
        else:
            failpoints.hit("pre_result")
            entry.answer.engine_s = done.engine_s
            outcome = Outcome(entry.answer.sent, done.value)
            if done.error is not None:
                outcome = Outcome(error=done.error)
            self._settle(entry, outcome, done.plan, done.writes)
            with contextlib.suppress(TrainerLost):  # then it is brought back before the next call
                await self._rules.settled(entry.position, work, self._turn)

    def _emit(self, entry: _Entry, part: bytes) -> None:
        if entry.answer.add(part):
            return
        # Readers have had results of ranks that died, and these are others (no CPU does that). They
        # must not be mixed: readers are told to ask again, and get these from the start.
        fresh = Answer()
        for good in [*entry.answer.sent, part]:
            fresh.add(good)
        message = "the ranks died, and what was answered of this call so far is void"
        entry.answer.fail(Unavailable(message, Reason.TRAINER_UNAVAILABLE, retry_after_s=0.0))
        entry.answer = fresh
        if entry.seq_id:
            self._answers.record(entry.seq_id, entry.call.digest, fresh, entry.position)

    def _settle(
        self, entry: _Entry, outcome: Outcome, plan: bytes = b"", writes: Sequence[Write] = ()
    ) -> None:
        """Record what a call answers, and answer once that is durable."""
        keep = bool(entry.seq_id)
        result = AddResult(self._name, entry.position, outcome, plan, keep)
        self._recording += 1
        if not plan:
            self._rules.forgot([entry.position])
        recorded = self._journal.commit(result, *writes, must=True)
        recorded.add_done_callback(lambda done: self._answer(entry, outcome, done))

    def _answer(self, entry: _Entry, outcome: Outcome, recorded: "asyncio.Future[None]") -> None:
        self._recording -= 1
        if recorded.cancelled() or recorded.exception() is not None:
            entry.answer.fail(shutting_down())
            return
        failpoints.hit("post_result_pre_ack")
        if outcome.error is not None:
            entry.answer.fail(outcome.error)
        else:
            entry.answer.finish(outcome.value)
        dropped = self._answers.trim()
        if dropped and self._closed is None:
            self._journal.commit(DropAnswers(self._name, dropped), must=True)

    async def _take_back(
        self, entry: _Entry, error: TinsmithError, *, written: bool = True
    ) -> None:
        """Nothing happened and the number is free: what came after has to wait for it again."""
        free = [entry.position] if written else []
        if entry.seq_id:
            self._answers.forget(entry.seq_id)
            self._answers.next_seq_id = entry.seq_id
            later = [e for e in self._ready if e.seq_id]
            self._ready = deque(e for e in self._ready if not e.seq_id)
            for waiting in later:
                free.append(waiting.position)
                self._park(waiting)
        self._rules.forgot([entry.position, *free])
        forgotten = self._journal.commit(ForgetCalls(self._name, free), must=True)
        if written:
            # Before that the caller may not hear that the number is free: it could be used for
            # something else, and after a restart this call would be there again.
            await forgotten
        entry.answer.fail(error)

    async def _again(self, entry: _Entry, why: str, *, blamed: bool) -> None:
        """The ranks died during this call: bring the model back, and make the call once more."""
        if not self._journal.keeps:
            _log.error("model %s is lost: %s", self._name, why)
            lost = model_lost(self._name)
            self.close(lost)
            entry.answer.fail(lost)
            return
        self._losses += 1
        entry.attempts += blamed
        if entry.attempts >= self._limits.call_attempts_max:
            _log.error("call %d of model %s is refused: %s", entry.seq_id, self._name, why)
            self._settle(entry, Outcome(error=_poisoned(entry, why)))
            return
        if blamed:
            count = CountAttempt(self._name, entry.position, entry.attempts)
            await self._journal.commit(count, must=True)
        if self._closed is not None:
            entry.answer.fail(self._closed)
            return
        _log.warning("call %d of model %s has to be made again: %s", entry.seq_id, self._name, why)
        entry.answer.rewind()
        self._ready.appendleft(entry)

    # --- the end ------------------------------------------------------------------------------

    def _give_up(self, error: TinsmithError) -> None:
        """The lane fails itself: the call under way must hear of it, too."""
        if self._under_way is not None and not self._under_way.answer.done:
            self._under_way.answer.fail(error)
        self.close(error)

    def close(self, error: TinsmithError) -> None:
        """Fail all that waits and all that comes with `error`; kept answers stay."""
        self._closed = error
        waiting = [*self._ready, *self._parked.values()]
        self._ready.clear()
        self._parked.clear()
        for entry in waiting:
            if entry.gap_timer is not None:
                entry.gap_timer.cancel()
            if not entry.answer.done:
                entry.answer.fail(error)

    async def ended(self) -> None:
        """Wait, after `close`, until the call under way has ended."""
        await self._ended.wait()

    def forget(self) -> None:
        """Drop the kept answers: the model is deleted."""
        self._answers.clear()


def _poisoned(entry: _Entry, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"the trainer failed {entry.attempts} times during this call; it is not tried again and "
        f"changed nothing of the model ({why})",
        Reason.CALL_POISONED,
        metadata={"attempts": str(entry.attempts)},
    )
