"""What came of a call: as readers follow it, and as the journal has it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from tinsmithd.errors import TinsmithError


class CallKind(StrEnum):
    """Which RPC a call came by, and with that the form of its answer."""

    FORWARD = "forward"
    FORWARD_BACKWARD = "forward_backward"
    OPTIM_STEP = "optim_step"
    SAVE_CHECKPOINT = "save_checkpoint"
    LOAD_CHECKPOINT = "load_checkpoint"


@dataclass(frozen=True)
class StoredAnswer:
    """A whole answer, as the journal has it.

    Attributes:
        outputs: One per datum, in the bytes of the wire; void with an error.
        value: The rest of the answer; JSON can hold it.
        error: Set in place of a value.
        kind: Of the call; None with an error, and where an older release wrote the answer down.
    """

    outputs: Sequence[bytes] = ()
    value: Mapping[str, Any] = field(default_factory=dict)
    error: TinsmithError | None = None
    kind: CallKind | None = None


class Answer:
    """An answer as it comes into being; any number of readers follow it from its start.

    It has outputs, one per datum, and then ends with a value or an error.

    Args:
        stored: Reads an answer that an earlier process gave, when somebody asks for it.
        kind: Of the call, where that is known.
    """

    def __init__(
        self,
        stored: Callable[[], Awaitable[StoredAnswer]] | None = None,
        kind: CallKind | None = None,
    ) -> None:
        self._kind = kind
        self._stored = stored
        self._outputs: list[bytes] = []
        self._next = 0
        self._value: Mapping[str, Any] = {}
        self._error: TinsmithError | None = None
        self._done = stored is not None
        self._written = self._done
        # Those who wait for it to change in any way.
        self._waiting: set[asyncio.Future[None]] = set()
        self.nbytes = 0
        """Bytes of its outputs."""
        self.engine_s = 0.0
        """Seconds that the ranks computed; 0 for an answer that was stored."""

    @property
    def done(self) -> bool:
        """True once it has ended."""
        return self._done

    @property
    def sent(self) -> list[bytes]:
        """The outputs so far."""
        return self._outputs[: self._next]

    def add(self, output: bytes) -> bool:
        """Append an output, or compare it with the one that was there before `rewind`.

        Returns:
            False where the two differ: readers have an output that is not true any more.
        """
        if self._next < len(self._outputs):
            if self._outputs[self._next] != output:
                return False
        else:
            self._outputs.append(output)
            self.nbytes += len(output)
            self._wake()
        self._next += 1
        return True

    def rewind(self) -> None:
        """The call starts once more; its outputs should be those that are there."""
        self._next = 0

    def accept(self) -> None:
        """The call is written down."""
        if not self._written:
            self._written = True
            self._wake()

    async def accepted(self) -> bool:
        """Wait until the call is written down; False where it ended with an error before.

        An error that an earlier process recorded counts as a call that was written down.
        """
        while not self._written:
            await self._change()
        return self._error is None

    def finish(self, value: Mapping[str, Any]) -> None:
        """End it with a value."""
        self._value, self._done, self._written = value, True, True
        self._wake()

    def fail(self, error: TinsmithError) -> None:
        """End it with an error; its outputs are void."""
        self._error, self._done, self._outputs, self.nbytes = error, True, [], 0
        self._written = True
        self._wake()

    def _wake(self) -> None:
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    async def _change(self) -> None:
        """Wait until anything changes."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            await future
        finally:
            self._waiting.discard(future)

    async def _read_stored(self) -> None:
        assert self._stored is not None
        found = await self._stored()
        self._stored = None
        self._outputs, self._value, self._error = list(found.outputs), found.value, found.error
        self._kind = found.kind

    async def kind(self) -> CallKind | None:
        """The call's kind; None for a refused one, and where an older release answered."""
        if self._stored is not None:
            await self._read_stored()
        return self._kind

    async def outputs(self) -> AsyncIterator[bytes]:
        """All outputs from the first on, until the end.

        Raises:
            TinsmithError: The answer is an error.
        """
        if self._stored is not None:
            await self._read_stored()
        index = 0
        while True:
            while index < len(self._outputs):
                yield self._outputs[index]
                index += 1
            if self._error is not None:
                raise self._error
            if self._done:
                return
            await self._change()

    async def value(self) -> Mapping[str, Any]:
        """The value, once it is there.

        Raises:
            TinsmithError: The answer is an error.
        """
        if self._stored is not None:
            await self._read_stored()
        while not self._done:
            await self._change()
        if self._error is not None:
            raise self._error
        return self._value
