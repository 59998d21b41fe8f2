"""One ordered lane per model: numbers in, effects in order, one at a time per lane.

Calls come in by number and are written to the journal (`Admission`). A call that changes nothing
but the ranks begins while it is written, any other once it is durable. Its answer is recorded after
the call itself, and before anybody hears it (`AnswerRecorder`). Lanes share the ranks by `Turns`: a
call takes one turn, or one for each of its batches, so that a lane with a long queue or large calls
delays another by one batch at most. When the ranks die the lane brings its model back
(`CallExecutor.restore`) and goes on with the call that was under way; its callers just wait. A
model without calls stays on disk then, as a suspended one that left the ranks between two calls:
its next call brings it back. A lane at `Rest` has a snapshot taken, so that the way back is short.
"""

import asyncio
import contextlib
import logging
from collections.abc import Mapping

from tinsmithd import failpoints, tracing
from tinsmithd.errors import DataLoss, Internal, ResourceExhausted, TinsmithError, Unavailable
from tinsmithd.owners import logged_id
from tinsmithd.training.call import (
    Answer,
    Call,
    ComputeWork,
    RefusedWork,
    StepWork,
    StoredAnswer,
    Work,
    call_poisoned,
    changes_model,
    model_lost,
    shutting_down,
)
from tinsmithd.training.journal import CountAttempt, Fenced, LoseModel
from tinsmithd.training.lane.admission import Admission, Calls, Parked
from tinsmithd.training.lane.answer_recorder import AnswerRecorder, ReadAnswer
from tinsmithd.training.lane.context import LaneContext
from tinsmithd.training.lane.presence import Presence
from tinsmithd.training.lane.rest import Rest
from tinsmithd.training.lane.turns import Turn, Turns
from tinsmithd.training.lane.waiting import QueuedCall
from tinsmithd.training.ranks import ModelBroken, RankGroupLost

_log = logging.getLogger(__name__)


class Lane:
    """The ordered calls of one model.

    Args:
        context: Whose calls, and what its parts share.
        turns: Shared by all lanes.

    Attributes:
        executor: Carries its calls out.
    """

    def __init__(self, context: LaneContext, turns: Turns) -> None:
        self._context = context
        self._model_id, self._name = context.model_id, logged_id(context.model_id)
        self._journal = context.journal
        self.executor = context.executor
        self._turns = turns
        self._admission = Admission(context, self._refuse)
        self.begin_after = self._admission.begin_after
        self._answers = AnswerRecorder(context)
        self._presence = Presence(context, lambda: self._closed is None)
        self._rest = Rest(context.limits.snapshot_idle_s, self._start)
        self._runner: asyncio.Task[None] | None = None
        self._under_way: QueuedCall | None = None
        self._ended = asyncio.Event()
        self._ended.set()
        self._closed: TinsmithError | None = None
        self._stopping = False

    @property
    def next_seq_id(self) -> int:
        """The number that the next new call should carry."""
        return self._admission.next_seq_id

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
        wanted = self._admission.ready or self.recovering or self._presence.leaving
        rests = self._rest.due and not self._presence.absent
        return self._closed is None and not self._stopping and (wanted or rests)

    @property
    def blocked(self) -> bool:
        """True while the ranks that there are cannot take the model."""
        return self._presence.blocked is not None

    @property
    def pending(self) -> int:
        """Calls that were taken in and are not answered."""
        return self._admission.count + (self._under_way is not None) + self._answers.recording

    @property
    def under_way(self) -> bool:
        """True while a call is carried out, or its answer recorded."""
        return self._under_way is not None or self._answers.recording > 0

    @property
    def idle(self) -> bool:
        """True when nothing waits and nothing runs."""
        return self._runner is None and not self._admission.parked and not self._answers.recording

    @property
    def idle_since_s(self) -> float:
        """When its last call ended, by the loop's clock."""
        return self._rest.since_s

    # --- calls come in ------------------------------------------------------------------------

    def submit(self, call: Call) -> Answer:
        """Take a call in; its answer comes when it had its turn.

        Raises:
            AlreadyExists, FailedPrecondition: See `KeptAnswers.find`.
            ResourceExhausted: The lane is full (QUEUE_FULL); the number is unused.
            DataLoss, NotFound: The model is lost or deleted.
        """
        if call.seq_id:
            answer = self._answers.find(call.seq_id, call.digest, self.next_seq_id)
            if answer is not None:
                return answer
        stopping = shutting_down() if self._stopping else None
        if refusal := self._closed or stopping or self._presence.blocked:
            raise refusal
        queued = self._admission.add(call)
        self._answers.keep(queued)
        self._start()
        return queued.answer

    def answer(self, seq_id: int, digest: bytes | None) -> Answer:
        """The answer of a call that was taken in, see `AnswerRecorder.get`."""
        return self._answers.get(seq_id, digest, self.next_seq_id, self._closed)

    def recall(
        self, calls: Calls, works: Mapping[int, Work], parked: Parked, read: ReadAnswer
    ) -> None:
        """Go on where an earlier process ended; `lose_ranks` or `stay_suspended` comes next.

        Args:
            calls: What the journal has of this model.
            works, parked: See `Admission.recall`.
            read: Makes what reads a recorded answer.
        """
        self._answers.recall(calls, read)
        waiting = (works, parked) if self._closed is None else ({}, ())
        for queued in self._admission.recall(calls, *waiting):
            self._answers.keep(queued)

    def _refuse(self, queued: QueuedCall, error: TinsmithError) -> None:
        """A call that waited leaves the lane, and its number is free."""
        self._answers.forget(queued)
        queued.answer.fail(error)

    # --- calls are carried out ----------------------------------------------------------------

    def lose_ranks(self) -> None:
        """The ranks are gone: bring the model to the next ones, unless nobody waits for it."""
        self._presence.lose(went_with_ranks=True)
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
        self._context.census.stirs(self._model_id, self)
        if self._runner is None and self._has_work:
            self._ended.clear()
            self._runner = asyncio.create_task(self._run(), name=f"lane {self._model_id}")

    async def _run(self) -> None:
        tracing.forget()  # the call that it was begun by is one of many
        came_back = False
        try:
            while self._has_work:
                # A model that came back for a call makes that call, however long the way was.
                if self._presence.leaving and not (came_back and self._admission.ready):
                    await self._presence.leave(self._turn)
                elif self._presence.absent:
                    came_back = await self._come_back()
                elif self._admission.ready:
                    came_back = False
                    await self._apply_next()
                else:
                    self._rest.due = False
                    with contextlib.suppress(RankGroupLost):
                        await self.executor.rest(self._turn)
        except Fenced:
            # This process ends: the journal and the model belong to another one.
            self._give_up(shutting_down())
        except Exception:
            _log.exception("the lane of model %s ended", self._name)
            self._give_up(Internal())
        finally:
            self._runner = None
            self._ended.set()

    async def _apply_next(self) -> None:
        self._rest.call_begins()
        self._under_way = self._admission.take()
        with tracing.at(self._under_way.mark, waited="queue"):
            await self._apply(self._under_way)
        self._under_way = None
        self._rest.call_ended()

    async def _come_back(self) -> bool:
        """Try to bring the model back, where somebody waits for it; returns whether it is."""
        if self._presence.went_with_ranks and not self._admission.ready:
            self._presence.stay_on_disk()
            return False
        try:
            await self._presence.come_back(self._turn)
        except DataLoss as error:
            _log.error("model %s is lost: %s", self._name, error)
            # Written first: a process that was replaced finds things gone, too.
            await self._journal.commit(LoseModel(self._model_id, error.message), must=True)
            self.close(error)
        return not self._presence.absent

    def _turn(self, tokens: int) -> Turn:
        return self._turns.take(self._model_id, tokens, self._check_open)

    def _check_open(self) -> None:
        # While it waited the model may have been deleted, or lost with its ranks.
        if self._closed is not None:
            raise self._closed

    async def _apply(self, queued: QueuedCall) -> None:
        work = queued.call.work
        early = isinstance(work, ComputeWork | StepWork) and self._journal.writable
        if not early and not await self._is_written(queued):
            return
        failpoints.hit("enqueue")
        if isinstance(work, RefusedWork):
            self._answers.settle(queued, StoredAnswer(error=work.error))
            return
        if self._presence.absent:  # other ranks came while the call was written down
            self._admission.put_back(queued)
            return
        try:
            effect = await self.executor.execute(
                queued.position,
                queued.seq_id,
                work,
                lambda output: self._answers.add_output(queued, output),
                self._turn,
            )
        except Exception as error:
            if await self._is_written(queued, begun=True):
                await self._fail(queued, error)
            return
        if not await self._is_written(queued, begun=True):
            return
        failpoints.hit("pre_result")
        queued.answer.engine_s = effect.engine_s
        answer = StoredAnswer(queued.answer.sent, effect.value)
        if effect.error is not None:
            answer = StoredAnswer(error=effect.error)
        self._answers.settle(queued, answer, effect.composition, effect.writes)
        with contextlib.suppress(RankGroupLost):  # then it is brought back before the next call
            await self.executor.settled(queued.position, work, self._turn)

    async def _is_written(self, queued: QueuedCall, *, begun: bool = False) -> bool:
        """Wait until a call is durable; one that cannot be written is refused, and its effect goes,
        which the ranks may have if it was `begun`."""
        try:
            if queued.written is not None:
                await queued.written
        except TinsmithError as error:  # the journal has no room for it
            # The model is brought back without it: the journal does not have it.
            if begun and changes_model(queued.call.work):
                self._presence.lose()
            await self._take_back(queued, error, written=False)
            return False
        return True

    async def _take_back(self, queued: QueuedCall, error: TinsmithError, *, written: bool) -> None:
        """Nothing happened: free the call's number, and let its caller know."""
        forgotten = self._admission.free(queued, written=written)
        self._answers.forget(queued)
        if written and forgotten is not None:
            # The caller must not hear earlier that the number is free: it could use it for
            # something else, and after a restart this call would be there again.
            await forgotten
        queued.answer.fail(error)

    async def _fail(self, queued: QueuedCall, error: Exception) -> None:
        """A call was not carried out."""
        if isinstance(error, Unavailable | ResourceExhausted):
            await self._take_back(queued, error, written=True)
        elif isinstance(error, TinsmithError):
            if self._closed is not None:  # nothing is recorded of a model that is gone
                queued.answer.fail(error)
            else:
                self._answers.settle(queued, StoredAnswer(error=error))
        elif isinstance(error, RankGroupLost | ModelBroken):
            await self._again(queued, str(error), blamed=error.blamed)
        elif isinstance(error, Fenced):
            raise error
        else:
            _log.error("a call of model %s failed", self._name, exc_info=error)
            self._answers.settle(queued, StoredAnswer(error=Internal()))

    async def _again(self, queued: QueuedCall, why: str, *, blamed: bool) -> None:
        """The ranks died during this call: bring the model back, and make the call once more."""
        if not self._journal.keeps:
            _log.error("model %s is lost: %s", self._name, why)
            lost = model_lost(self._model_id)
            self.close(lost)
            queued.answer.fail(lost)
            return
        self._presence.lose()
        queued.attempts += blamed
        if queued.attempts >= self._context.limits.call_attempts_max:
            _log.error("call %d of model %s is refused: %s", queued.seq_id, self._name, why)
            error = call_poisoned(queued.attempts, why)
            self._answers.settle(queued, StoredAnswer(error=error))
            return
        if blamed:
            count = CountAttempt(self._model_id, queued.position, queued.attempts)
            await self._journal.commit(count, must=True)
        if self._closed is not None:
            queued.answer.fail(self._closed)
            return
        _log.warning("call %d of model %s is made again: %s", queued.seq_id, self._name, why)
        queued.answer.rewind()
        self._admission.put_back(queued)

    # --- the end ------------------------------------------------------------------------------

    def stop(self, *, under_way: bool = False) -> None:
        """This process ends: who waits hears it now, and what comes is refused.

        What was taken in stays in the journal: the next process makes it, and repeats its answer.

        Args:
            under_way: Whether the caller of the call under way hears it, too.
        """
        self._stopping = True
        told = self._admission.clear()
        if under_way and self._under_way is not None and not self._under_way.answer.done:
            told.append(self._under_way)
        for queued in told:
            queued.answer.fail(shutting_down())

    def _give_up(self, error: TinsmithError) -> None:
        """The lane fails itself: the call under way must hear of it, too."""
        if self._under_way is not None and not self._under_way.answer.done:
            self._under_way.answer.fail(error)
        self.close(error)

    def close(self, error: TinsmithError) -> None:
        """Fail all that waits and all that comes with `error`; kept answers stay."""
        self._closed = error
        self._answers.closed = True
        self._context.census.closed(self._model_id, lost=self.lost)
        for queued in self._admission.clear():
            if not queued.answer.done:
                queued.answer.fail(error)

    async def ended(self) -> None:
        """Wait, after `close`, until the call under way has ended."""
        await self._ended.wait()

    def forget(self) -> None:
        """Drop the kept answers: the model is deleted."""
        self._answers.clear()
