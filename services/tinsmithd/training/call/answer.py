"""The calls of one model by number, with their answers: what makes a repeat a repeat."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tinsmithd.errors import AlreadyExists, FailedPrecondition, Reason, TinsmithError
from tinsmithd.training.call.work import Outcome


class Answer:
    """An answer as it comes into being; any number of readers follow it from its start.

    It has parts (results of one datum each) and then ends with a value or an error.

    Args:
        stored: Reads an answer that was given earlier, when somebody asks for it.
    """

    def __init__(self, stored: Callable[[], Awaitable[Outcome]] | None = None) -> None:
        self._stored = stored
        self._parts: list[bytes] = []
        self._next = 0
        self._value: Mapping[str, Any] = {}
        self._error: TinsmithError | None = None
        self._done = stored is not None
        self._changed = asyncio.Event()
        self.nbytes = 0
        """Bytes of its parts."""
        self.engine_s = 0.0
        """Seconds that the ranks computed; unknown of an answer that was stored."""

    @property
    def done(self) -> bool:
        """True once it has ended."""
        return self._done

    @property
    def sent(self) -> list[bytes]:
        """The parts so far."""
        return self._parts[: self._next]

    def add(self, part: bytes) -> bool:
        """Append a part, or meet one that was there before `rewind`.

        Returns:
            False where the one that was there is another: readers have it, and it is not true.
        """
        if self._next < len(self._parts):
            if self._parts[self._next] != part:
                return False
        else:
            self._parts.append(part)
            self.nbytes += len(part)
            self._wake()
        self._next += 1
        return True

    def rewind(self) -> None:
        """The call is made again from its start; what it adds should be what is there."""
        self._next = 0

    def finish(self, value: Mapping[str, Any]) -> None:
        """End it with a value."""
        self._value, self._done = value, True
        self._wake()

    def fail(self, error: TinsmithError) -> None:
        """End it with an error; its parts are void."""
        self._error, self._done, self._parts, self.nbytes = error, True, [], 0
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _read_stored(self) -> None:
        assert self._stored is not None
        outcome = await self._stored()
        self._stored = None
        self._parts, self._value, self._error = list(outcome.parts), outcome.value, outcome.error

    async def parts(self) -> AsyncIterator[bytes]:
        """All parts from the first on, until the end.

        Raises:
            TinsmithError: The answer is an error.
        """
        if self._stored is not None:
            await self._read_stored()
        index = 0
        while True:
            changed = self._changed
            while index < len(self._parts):
                yield self._parts[index]
                index += 1
            if self._error is not None:
                raise self._error
            if self._done:
                return
            if changed is self._changed:
                await changed.wait()

    async def value(self) -> Mapping[str, Any]:
        """The value, once it is there.

        Raises:
            TinsmithError: The answer is an error.
        """
        async for _ in self.parts():
            pass
        return self._value


@dataclass
class _Kept:
    digest: bytes
    position: int
    answer: Answer
    nbytes: int = 0


class Answers:
    """Content digest and answer of each numbered call of one model, the newest of them.

    Args:
        kept_max: Answers kept.
        bytes_kept_max: Bytes of their parts; the newest is kept however large it is.
    """

    def __init__(self, kept_max: int, bytes_kept_max: int) -> None:
        self._kept_max = kept_max
        self._bytes_kept_max = bytes_kept_max
        self._calls: OrderedDict[int, _Kept] = OrderedDict()
        self.next_seq_id = 1
        """The number that is to take effect next."""

    def find(self, seq_id: int, digest: bytes) -> Answer | None:
        """The answer of an earlier call with this number, if there was one.

        Raises:
            AlreadyExists: That call had other content (SEQ_ID_CONFLICT).
            FailedPrecondition: It was long ago (ANSWER_EXPIRED).
        """
        metadata = {"seq_id": str(seq_id), "next_seq_id": str(self.next_seq_id)}
        if seq_id in self._calls:
            kept = self._calls[seq_id]
            if kept.digest != digest:
                message = f"seq_id {seq_id} was used with other content"
                raise AlreadyExists(message, Reason.SEQ_ID_CONFLICT, metadata=metadata)
            return kept.answer
        if seq_id < self.next_seq_id:
            message = f"the answer of seq_id {seq_id} is no longer kept"
            raise FailedPrecondition(message, Reason.ANSWER_EXPIRED, metadata=metadata)
        return None

    def record(self, seq_id: int, digest: bytes, answer: Answer, position: int = 0) -> None:
        """Keep a call, before it is queued, or again with another answer or place."""
        self._calls[seq_id] = _Kept(digest, position, answer)

    def restore(
        self, seq_id: int, digest: bytes, answer: Answer, position: int, nbytes: int
    ) -> None:
        """Keep a call that was answered before this process began."""
        self._calls[seq_id] = _Kept(digest, position, answer, nbytes)

    def forget(self, seq_id: int) -> None:
        """Strike out a call that was never applied, so that it can be sent again."""
        self._calls.pop(seq_id, None)

    def trim(self) -> int:
        """Drop the oldest answers beyond what is kept, in number and in bytes.

        Returns:
            The place of the last one dropped, 0 for none.
        """
        done = sorted(
            seq_id
            for seq_id, kept in self._calls.items()
            if kept.answer.done and seq_id < self.next_seq_id
        )
        count = nbytes = dropped = 0
        for seq_id in reversed(done):
            kept = self._calls[seq_id]
            nbytes += kept.nbytes or kept.answer.nbytes
            # The newest stays however large it is: its caller may still have to ask again.
            if count and (count == self._kept_max or nbytes > self._bytes_kept_max):
                del self._calls[seq_id]
                dropped = max(dropped, kept.position)
            else:
                count += 1
        return dropped

    def clear(self) -> None:
        """Forget all calls."""
        self._calls.clear()
