"""The calls of one model by number, with their answers: what makes a repeat a repeat.

This journal lives in memory (durability mode NONE): it makes calls exactly-once towards clients
that lose their connection, not towards a Training server that dies.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from typing import Any

from tinsmithd.errors import AlreadyExists, FailedPrecondition, Reason, TinsmithError


class Answer:
    """An answer as it comes into being; any number of readers follow it from its start.

    It has parts (results of one datum each) and then ends with a value or an error.
    """

    def __init__(self) -> None:
        self._parts: list[Any] = []
        self._value: Any = None
        self._error: TinsmithError | None = None
        self._done = False
        self._changed = asyncio.Event()
        self.nbytes = 0
        """Bytes of the arrays in its parts."""

    @property
    def done(self) -> bool:
        """True once it has ended."""
        return self._done

    def add(self, part: Any) -> None:
        """Append a part."""
        self._parts.append(part)
        if isinstance(part, Mapping):
            self.nbytes += sum(getattr(value, "nbytes", 0) for value in part.values())
        self._wake()

    def finish(self, value: Any) -> None:
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

    async def parts(self) -> AsyncIterator[Any]:
        """All parts from the first on, until the end.

        Raises:
            TinsmithError: The answer is an error.
        """
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

    async def value(self) -> Any:
        """The value, once it is there.

        Raises:
            TinsmithError: The answer is an error.
        """
        async for _ in self.parts():
            pass
        return self._value


class Journal:
    """Content digest and answer of each numbered call of one model, the newest of them."""

    def __init__(self, answers_kept_max: int, answer_bytes_kept_max: int) -> None:
        self._kept_max = answers_kept_max
        self._bytes_kept_max = answer_bytes_kept_max
        self._calls: OrderedDict[int, tuple[bytes, Answer]] = OrderedDict()
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
            first, answer = self._calls[seq_id]
            if first != digest:
                message = f"seq_id {seq_id} was used with other content"
                raise AlreadyExists(message, Reason.SEQ_ID_CONFLICT, metadata=metadata)
            return answer
        if seq_id < self.next_seq_id:
            message = f"the answer of seq_id {seq_id} is no longer kept"
            raise FailedPrecondition(message, Reason.ANSWER_EXPIRED, metadata=metadata)
        return None

    def record(self, seq_id: int, digest: bytes, answer: Answer) -> None:
        """Write a call down, before it is queued."""
        self._calls[seq_id] = (digest, answer)

    def forget(self, seq_id: int) -> None:
        """Strike out a call that was never applied, so that it can be sent again."""
        self._calls.pop(seq_id, None)

    def trim(self) -> None:
        """Drop the oldest answers beyond what is kept, in number and in bytes."""
        done = sorted(
            seq_id
            for seq_id, (_, answer) in self._calls.items()
            if answer.done and seq_id < self.next_seq_id
        )
        kept = nbytes = 0
        for seq_id in reversed(done):
            nbytes += self._calls[seq_id][1].nbytes
            # The newest stays however large it is: its caller may still have to ask again.
            if kept and (kept == self._kept_max or nbytes > self._bytes_kept_max):
                del self._calls[seq_id]
            else:
                kept += 1

    def clear(self) -> None:
        """Forget all calls."""
        self._calls.clear()
