"""The answers of one model's numbered calls: they make a repeat a repeat."""

from collections import OrderedDict
from dataclasses import dataclass

from tinsmithd.errors import AlreadyExists, FailedPrecondition, Reason
from tinsmithd.training.call import Answer


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
    """

    def __init__(self, kept_max: int, bytes_kept_max: int) -> None:
        self._kept_max = kept_max
        self._bytes_kept_max = bytes_kept_max
        self._answers: OrderedDict[int, _Kept] = OrderedDict()

    def find(self, seq_id: int, digest: bytes | None, next_seq_id: int) -> Answer | None:
        """The answer of an earlier call with this number, if there was one.

        Args:
            seq_id: The number.
            digest: Of the call; None takes any.
            next_seq_id: The number that is to take effect next.

        Raises:
            AlreadyExists: That call had other content (SEQ_ID_CONFLICT).
            FailedPrecondition: It was long ago (ANSWER_EXPIRED).
        """
        metadata = {"seq_id": str(seq_id), "next_seq_id": str(next_seq_id)}
        if seq_id in self._answers:
            kept = self._answers[seq_id]
            if digest is not None and kept.digest != digest:
                message = f"seq_id {seq_id} was used with other content"
                raise AlreadyExists(message, Reason.SEQ_ID_CONFLICT, metadata=metadata)
            return kept.answer
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

    def settle(self, seq_id: int, position: int) -> None:
        """The journal was given the answer, at this position."""
        if seq_id in self._answers:
            self._answers[seq_id].position = position

    def forget(self, seq_id: int) -> None:
        """Strike out a call that took no effect: its number is free again."""
        self._answers.pop(seq_id, None)

    def trim(self) -> int:
        """Drop the oldest recorded answers beyond what is kept, in number and in bytes.

        Returns:
            The position of the last one dropped, 0 for none.
        """
        done = sorted(
            seq_id for seq_id, kept in self._answers.items() if kept.answer.done and kept.position
        )
        count = nbytes = dropped = 0
        for seq_id in reversed(done):
            kept = self._answers[seq_id]
            nbytes += kept.nbytes or kept.answer.nbytes
            # The newest stays however large it is: its caller may still have to ask again.
            if count and (count == self._kept_max or nbytes > self._bytes_kept_max):
                del self._answers[seq_id]
                dropped = max(dropped, kept.position)
            else:
                count += 1
        return dropped

    def clear(self) -> None:
        """Forget all calls."""
        self._answers.clear()
