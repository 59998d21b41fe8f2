"""One ordered lane per model: numbers in, effects in order, one at a time per lane.

Calls come in by number and are written to the journal (`Waiting`). What changes nothing but the
ranks begins while it is written, all else once it is durable; what a call answers is recorded,
after the call itself, before anybody hears it. Lanes share the trainer by `Turns`: a call takes one
turn, or one for each of its parts, so that a lane with a long queue or large calls delays another
by one part at most.

When the ranks die the lane brings its model back (`Rules.restore`) and goes on with the call that
was under way; its callers just wait. A suspended model leaves the ranks between two calls and
comes back in the same way, with its next call.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from tinsmithd import failpoints
from tinsmithd.errors import (
    DataLoss,
    Internal,
    Reason,
    ResourceExhausted,
    TinsmithError,
    Unavailable,
)
from tinsmithd.training.call.answer import Answer
from tinsmithd.training.call.work import (
    ComputeWork,
    Outcome,
    RefusedWork,
    StepWork,
    Work,
    changes_model,
)
from tinsmithd.training.journal.journal import Journal
from tinsmithd.training.journal.records import (
    AddResult,
    CountAttempt,
    DropAnswers,
    Fenced,
    LoseModel,
    StoredCall,
    Write,
)
from tinsmithd.training.lane.admission import Entry, Waiting
from tinsmithd.training.lane.interface import (
    Call,
    LaneLimits,
    Rules,
    call_poisoned,
    model_lost,
    shutting_down,
)
from tinsmithd.training.lane.presence import Presence
from tinsmithd.training.lane.turns import Turns
from tinsmithd.training.ranks.interface import ModelBroken, TrainerLost

BROKEN_PAUSE_S = 1.0
"""Between two tries to bring a model back that the ranks could not hold."""

_log = logging.getLogger(__name__)


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
        self._waiting = Waiting(name, limits, journal, rules)
        self._answers = self._waiting.answers
        self._recording = 0
        self._presence = Presence()
        self.idle_since_s = 0.0
        """When its last call ended, by the loop's clock."""
        self._runner: asyncio.Task[None] | None = None
        self._under_way: Entry | None = None
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
        """True while the ranks do not have the model's state and should."""
        return self._closed is None and self._presence.absent and not self._presence.suspended

    @property
    def resuming(self) -> bool:
        """True while a suspended model is brought back because of a call."""
        return self.recovering and self._presence.resuming

    @property
    def suspended(self) -> bool:
        """True while the model's state is on disk alone; its next call brings it back."""
        return self._closed is None and self._presence.suspended

    @property
    def _has_work(self) -> bool:
        wanted = self._waiting.ready or self.recovering or self._presence.leaving
        return self._closed is None and wanted

    @property
    def blocked(self) -> bool:
        """True while the model cannot be brought back to the ranks that there are."""
        return self._blocked is not None

    @property
    def pending(self) -> int:
        """Calls taken in and not answered yet."""
        return self._waiting.count + (self._under_way is not None) + self._recording

    @property
    def idle(self) -> bool:
        """True when nothing waits and nothing runs."""
        return self._runner is None and not self._waiting.parked and not self._recording

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
        answer = self._waiting.add(seq_id, call)
        self._start()
        return answer

    def recall(
        self,
        calls: Sequence[StoredCall],
        works: Mapping[int, Work],
        read: Callable[[int], Callable[[], Any]],
    ) -> None:
        """Go on where an earlier process ended, see `Waiting.recall`; `lose_trainer` comes next."""
        self._waiting.recall(calls, works if self._closed is None else {}, read)

    # --- calls are carried out ----------------------------------------------------------------

    def lose_trainer(self) -> None:
        """The ranks do not have the model's state any more."""
        self._presence.lose()
        self._start()

    def suspend(self) -> None:
        """Leave the ranks before the next call, or at once; that call brings the model back."""
        self._presence.leaving = True
        self._start()

    def stay_suspended(self) -> None:
        """After a start: leave the state on disk until there is a call."""
        self._presence.suspend()
        self._start()

    def _start(self) -> None:
        if self._runner is None and self._has_work:
            self._ended.clear()
            self._runner = asyncio.create_task(self._run(), name=f"lane {self._name}")

    async def _run(self) -> None:
        came_back = False
        try:
            while self._has_work:
                # Whoever came back for a call makes it, however long the way was.
                if self._presence.leaving and not (came_back and self._waiting.ready):
                    await self._suspend()
                elif self._presence.absent:
                    await self._restore()
                    came_back = not self._presence.absent
                else:
                    came_back = False
                    self._under_way = self._waiting.take()
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
            self.idle_since_s = asyncio.get_running_loop().time()
            self._ended.set()

    async def _suspend(self) -> None:
        try:
            if not self._presence.absent:
                await self._rules.suspend(self._turn)
        except (TinsmithError, TrainerLost, ModelBroken) as error:
            # Whatever the ranks have of it, they drop it before they get it again.
            if self._closed is None:
                _log.warning("model %s left the ranks with an error: %s", self._name, error)
        self._presence.suspend()
        self._blocked = None
        self._rules.left()

    async def _restore(self) -> None:
        losses = self._presence.begin()
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
            self._presence.end(losses)
            self._blocked = None

    @contextlib.asynccontextmanager
    async def _turn(self, tokens: int) -> AsyncIterator[None]:
        async with self._turns.take(self._name, tokens):
            # While it waited the model may have been deleted, or lost with its trainer.
            if self._closed is not None:
                raise self._closed
            yield

    async def _apply(self, entry: Entry) -> None:
        work = entry.call.work
        early = isinstance(work, ComputeWork | StepWork) and self._journal.writable
        if not early and not await self._is_written(entry):
            return
        failpoints.hit("enqueue")
        if isinstance(work, RefusedWork):
            self._settle(entry, Outcome(error=work.error))
            return
        if self._presence.absent:  # other ranks came while it was written down
            self._waiting.put_back(entry)
            return
        try:
            done = await self._rules.execute(
                entry.position, entry.seq_id, work, lambda part: self._emit(entry, part), self._turn
            )
        except Exception as error:
            if await self._is_written(entry, begun=True):
                await self._fail(entry, error)
            return
        if not await self._is_written(entry, begun=True):
            return
        failpoints.hit("pre_result")
        entry.answer.engine_s = done.engine_s
        outcome = Outcome(entry.answer.sent, done.value)
        if done.error is not None:
            outcome = Outcome(error=done.error)
        self._settle(entry, outcome, done.plan, done.writes)
        with contextlib.suppress(TrainerLost):  # then it is brought back before the next call
            await self._rules.settled(entry.position, work, self._turn)

    async def _is_written(self, entry: Entry, *, begun: bool = False) -> bool:
        """Wait until a call is durable; one that cannot be written is refused, and its effect goes.

        Args:
            entry: The call.
            begun: The ranks may have its effect.
        """
        try:
            if entry.written is not None:
                await entry.written
        except TinsmithError as error:  # there is no room to write it down
            # Brought back, the model is without it: the journal does not have it.
            if begun and changes_model(entry.call.work):
                self._presence.lose()
            await self._waiting.take_back(entry, error, written=False)
            return False
        return True

    async def _fail(self, entry: Entry, error: Exception) -> None:
        """A call was not carried out."""
        if isinstance(error, Unavailable | ResourceExhausted):
            await self._waiting.take_back(entry, error, written=True)
        elif isinstance(error, TinsmithError):
            if self._closed is not None:  # nothing is recorded of a model that is gone
                entry.answer.fail(error)
            else:
                self._settle(entry, Outcome(error=error))
        elif isinstance(error, TrainerLost):
            await self._again(entry, str(error), blamed=error.blamed)
        elif isinstance(error, ModelBroken):
            await self._again(entry, str(error), blamed=True)
        elif isinstance(error, Fenced):
            raise error
        else:
            _log.error("a call of model %s failed", self._name, exc_info=error)
            self._settle(entry, Outcome(error=Internal()))

    def _emit(self, entry: Entry, part: bytes) -> None:
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
        self, entry: Entry, outcome: Outcome, plan: bytes = b"", writes: Sequence[Write] = ()
    ) -> None:
        """Record what a call answers, and answer once that is durable."""
        keep = bool(entry.seq_id)
        result = AddResult(self._name, entry.position, outcome, plan, keep)
        self._recording += 1
        if not plan:
            self._rules.forgot([entry.position])
        recorded = self._journal.commit(result, *writes, must=True)
        recorded.add_done_callback(lambda done: self._answer(entry, outcome, done))

    def _answer(self, entry: Entry, outcome: Outcome, recorded: "asyncio.Future[None]") -> None:
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

    async def _again(self, entry: Entry, why: str, *, blamed: bool) -> None:
        """The ranks died during this call: bring the model back, and make the call once more."""
        if not self._journal.keeps:
            _log.error("model %s is lost: %s", self._name, why)
            lost = model_lost(self._name)
            self.close(lost)
            entry.answer.fail(lost)
            return
        self._presence.lose()
        entry.attempts += blamed
        if entry.attempts >= self._limits.call_attempts_max:
            _log.error("call %d of model %s is refused: %s", entry.seq_id, self._name, why)
            self._settle(entry, Outcome(error=call_poisoned(entry.attempts, why)))
            return
        if blamed:
            count = CountAttempt(self._name, entry.position, entry.attempts)
            await self._journal.commit(count, must=True)
        if self._closed is not None:
            entry.answer.fail(self._closed)
            return
        _log.warning("call %d of model %s has to be made again: %s", entry.seq_id, self._name, why)
        entry.answer.rewind()
        self._waiting.put_back(entry)

    # --- the end ------------------------------------------------------------------------------

    def _give_up(self, error: TinsmithError) -> None:
        """The lane fails itself: the call under way must hear of it, too."""
        if self._under_way is not None and not self._under_way.answer.done:
            self._under_way.answer.fail(error)
        self.close(error)

    def close(self, error: TinsmithError) -> None:
        """Fail all that waits and all that comes with `error`; kept answers stay."""
        self._closed = error
        for entry in self._waiting.clear():
            if not entry.answer.done:
                entry.answer.fail(error)

    async def ended(self) -> None:
        """Wait, after `close`, until the call under way has ended."""
        await self._ended.wait()

    def forget(self) -> None:
        """Drop the kept answers: the model is deleted."""
        self._answers.clear()
