"""Records what calls answer, and answers once that is durable."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from tinsmithd import failpoints
from tinsmithd.errors import Reason, TinsmithError, Unavailable
from tinsmithd.training.call import Answer, StoredAnswer, call_not_found, kind_of, shutting_down
from tinsmithd.training.journal import AddAnswer, DropAnswers, StoredCall, Write
from tinsmithd.training.lane.context import LaneContext
from tinsmithd.training.lane.kept_answers import KeptAnswers
from tinsmithd.training.lane.waiting import QueuedCall

ReadAnswer = Callable[[int], Callable[[], Awaitable[StoredAnswer]]]
"""Makes, for a position, what reads the answer there."""


class AnswerRecorder:
    """The answers of one lane.

    Args:
        context: What the lane's parts share.

    Attributes:
        recording: Number of answers that are not durable yet.
        closed: Set once the model is lost or deleted: what it answered stays as it is.
    """

    def __init__(self, context: LaneContext) -> None:
        self._context = context
        limits = context.limits
        self._kept = KeptAnswers(
            limits.answers_kept_max, limits.answer_bytes_kept_max, context.journal.restored_at
        )
        self._dropped = 0  # the position up to which no answer is kept
        self.recording = 0
        self.closed = False

    def find(self, seq_id: int, digest: bytes | None, next_seq_id: int) -> Answer | None:
        """See `KeptAnswers.find`."""
        return self._kept.find(seq_id, digest, next_seq_id)

    def get(
        self, seq_id: int, digest: bytes | None, next_seq_id: int, closed: TinsmithError | None
    ) -> Answer:
        """The answer of a call that was taken in, as it comes into being or came.

        Args:
            seq_id: The call's number.
            digest: The call's digest; None takes any.
            next_seq_id: The number that is to take effect next.
            closed: Why the model takes no calls any more.

        Raises:
            AlreadyExists, FailedPrecondition: See `KeptAnswers.find`.
            NotFound: There is no such call: it did not come, or took no effect (CALL_NOT_FOUND).
            TinsmithError: So it is, and the model takes no calls any more.
        """
        answer = self.find(seq_id, digest, next_seq_id)
        if answer is None:
            raise closed or call_not_found(seq_id, next_seq_id)
        return answer

    def keep(self, queued: QueuedCall) -> None:
        """Keep the answer of a call that was taken in."""
        if queued.seq_id:
            self._kept.add(queued.seq_id, queued.call.digest, queued.answer)

    def recall(self, calls: Sequence[StoredCall], read: ReadAnswer) -> None:
        """Keep the answers that an earlier process recorded."""
        for call in calls:
            if call.answer_digest is not None and call.seq_id and call.answer_bytes:
                answer = Answer(read(call.position))
                self._kept.add(call.seq_id, call.digest, answer, call.position, call.answer_bytes)

    def forget(self, queued: QueuedCall) -> None:
        """A call took no effect, and its number is free."""
        if queued.seq_id:
            self._kept.forget(queued.seq_id)

    def clear(self) -> None:
        """The model is deleted."""
        self._kept.clear()

    def add_output(self, queued: QueuedCall, output: bytes) -> None:
        """Give readers the next output of a call."""
        if queued.answer.add(output):
            return
        # Readers have outputs of ranks that died, and these ranks give others (no CPU does that).
        # They must not be mixed: readers are told to ask again, and get these from the start.
        fresh = Answer(kind=kind_of(queued.call.work))
        fresh.accept()
        for good in [*queued.answer.sent, output]:
            fresh.add(good)
        message = "the ranks died, and what was answered of this call so far is void"
        queued.answer.fail(Unavailable(message, Reason.RANK_GROUP_UNAVAILABLE, retry_after_s=0.0))
        queued.answer = fresh
        self.keep(queued)

    def settle(
        self,
        queued: QueuedCall,
        answer: StoredAnswer,
        composition: bytes = b"",
        writes: Sequence[Write] = (),
    ) -> None:
        """Record what a call answers, and answer once that is durable."""
        if answer.error is None:
            kind = kind_of(queued.call.work)
            answer = StoredAnswer(answer.outputs, answer.value, kind=kind)
        keep = bool(queued.seq_id)
        add = AddAnswer(self._context.model_id, queued.position, answer, composition, keep)
        self.recording += 1
        if not composition:
            self._context.executor.forgot([queued.position])
        recorded = self._context.journal.commit(add, *writes, must=True)
        recorded.add_done_callback(lambda done: self._give(queued, answer, done))

    def _give(
        self, queued: QueuedCall, answer: StoredAnswer, recorded: "asyncio.Future[None]"
    ) -> None:
        self.recording -= 1
        if recorded.cancelled() or recorded.exception() is not None:
            queued.answer.fail(shutting_down())
            return
        failpoints.hit("post_result_pre_ack")
        if answer.error is not None:
            queued.answer.fail(answer.error)
        else:
            queued.answer.finish(answer.value)
        dropped = self._kept.recorded(queued.seq_id, queued.position) if queued.seq_id else 0
        if dropped and not self.closed:
            drop = DropAnswers(self._context.model_id, dropped, self._dropped)
            self._context.journal.commit(drop, must=True)
            self._dropped = dropped
