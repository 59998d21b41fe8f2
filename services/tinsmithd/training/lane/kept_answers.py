"""The answers of one model's numbered calls: they make a repeat a repeat."""

from collections import OrderedDict, deque
from dataclasses import dataclass

from tinsmithd.errors import AlreadyExists, FailedPrecondition, Reason
from tinsmithd.training.call import Answer, model_restored


@dataclass
class _Kept:
    digest: bytes
    answer: Answer
    position: int = 0
    nbytes: int = 0


class KeptAnswers:
    """Content digest and answer of each numbered call of one model, the newest of them.

    Args:
        kept_max: Maximum number of answers.
        bytes_kept_max: Maximum bytes of their outputs; the newest stays however large it is.
        restored_at: See `Journal.restored_at`.
    """

    def __init__(self, kept_max: int, bytes_kept_max: int, restored_at: int = 0) -> None:
        self._restored_at = restored_at
        self._kept_max = kept_max
        self._bytes_kept_max = bytes_kept_max
        self._answers: OrderedDict[int, _Kept] = OrderedDict()
        # The numbers of those that the journal has, which rise; and bytes of all of them.
        self._recorded: deque[int] = deque()
        self._nbytes = 0

    def find(self, seq_id: int, digest: bytes | None, next_seq_id: int) -> Answer | None:
        """The answer of an earlier call with this number, if there was one.

        Args:
            seq_id: The number.
            digest: Of the call; None takes any.
            next_seq_id: The number that is to take effect next.

        Raises:
            AlreadyExists: That call had other content (SEQ_ID_CONFLICT).
            FailedPrecondition: It was long ago (ANSWER_EXPIRED), or before the back-up from which
                the model goes on (MODEL_RESTORED).
        """
        metadata = {"seq_id": str(seq_id), "next_seq_id": str(next_seq_id)}
        if seq_id in self._answers:
            kept = self._answers[seq_id]
            if digest is not None and kept.digest != digest:
                message = f"seq_id {seq_id} was used with other content"
                raise AlreadyExists(message, Reason.SEQ_ID_CONFLICT, metadata=metadata)
            return kept.answer
        if seq_id <= self._restored_at < next_seq_id:
            raise model_restored(seq_id, next_seq_id)
        if seq_id < next_seq_id:
            message = f"the answer of seq_id {seq_id} is no longer kept"
            raise FailedPrecondition(message, Reason.ANSWER_EXPIRED, metadata=metadata)
        return None

    def add(
        self, seq_id: int, digest: bytes, answer: Answer, position: int = 0, nbytes: int = 0
    ) -> None:
        """Keep the answer of a call.

        Args:
            seq_id: The call's number.
            digest: The call's digest.
            answer: In place of any that the number has.
            position: The call's position, where the journal has the answer already.
            nbytes: Bytes of an answer that was stored.
        """
        self._answers[seq_id] = _Kept(digest, answer, position, nbytes)
        if position:
            self._record(seq_id, nbytes)

    def recorded(self, seq_id: int, position: int) -> int:
        """The journal has the answer, at this position. Drops the oldest of those that it has, as
        far as they are beyond what is kept, in number and in bytes.

        Returns:
            The position of the last one dropped, 0 for none.
        """
        kept = self._answers.get(seq_id)
        if kept is not None and not kept.position:
            kept.position, kept.nbytes = position, kept.answer.nbytes
            self._record(seq_id, kept.nbytes)
        return self._trim()

    def _record(self, seq_id: int, nbytes: int) -> None:
        self._recorded.append(seq_id)
        self._nbytes += nbytes

    def forget(self, seq_id: int) -> None:
        """Strike out a call that took no effect: its number is free again."""
        self._answers.pop(seq_id, None)

    def _trim(self) -> int:
        dropped = 0
        # The newest stays however large it is: its caller may still have to ask again.
        while len(self._recorded) > 1 and (
            len(self._recorded) > self._kept_max or self._nbytes > self._bytes_kept_max
        ):
            kept = self._answers.pop(self._recorded.popleft())
            self._nbytes -= kept.nbytes
            dropped = kept.position
        return dropped

    def clear(self) -> None:
        """Forget all calls."""
        self._answers.clear()
        self._recorded.clear()
        self._nbytes = 0
