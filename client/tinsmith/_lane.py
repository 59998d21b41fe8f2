"""Numbers the calls of one model and gets each of them through, in order, exactly once.

A number is taken when a call is made, in the order of the program, and is never given up: the
call is sent in a task of its own until the service has answered it, whether or not anybody still
waits for the answer. Cancelling a future therefore leaves no hole that later calls would wait for.
A refusal that leaves the number unused on the server is followed by an empty call that uses it up.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from tinsmith import _loop
from tinsmith._connection import Connection
from tinsmith._retry import is_retryable
from tinsmith.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
    TinsmithError,
)
from tinsmith.v1 import training_service_pb2 as pb

T = TypeVar("T")


class Lane:
    """The calls of one model.

    Args:
        connection: Where to.
        model_id: Which model.
        next_seq_id: Number of the first call.
    """

    def __init__(self, connection: Connection, model_id: str, next_seq_id: int) -> None:
        self._connection = connection
        self._model_id = model_id
        self._next_seq_id = next_seq_id
        self._lock = threading.Lock()
        self._undelivered: TinsmithError | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    def submit(
        self, count: int, start: Callable[[Sequence[int]], Coroutine[Any, Any, T]]
    ) -> "Future[T]":
        """Take the next numbers and start the calls that carry them.

        Args:
            count: How many numbers.
            start: Makes the coroutine that uses up all of them, whatever happens.
        """
        with self._lock:  # starts in the order of the numbers, from any thread
            numbers = range(self._next_seq_id, self._next_seq_id + count)
            self._next_seq_id += count
            return _loop.run(self._protected(start(numbers)))

    async def _protected(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.ensure_future(work)
        # Whoever waits may give up; the work may not.
        task.add_done_callback(_consume)
        self._tasks.add(task)  # the loop itself holds tasks only weakly
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def call(self, what: str, seq_id: int, attempt: Callable[[], Awaitable[T]]) -> T:
        """Send one numbered call until it is answered.

        Args:
            what: Names the call in messages.
            seq_id: Its number.
            attempt: Sends it once.

        Raises:
            TinsmithError: The answer. After a call that could not be delivered at all, every
                later one: their effects would be out of order.
        """

        async def checked() -> T:
            if self._undelivered is not None:
                raise FailedPreconditionError(
                    f"{what}: an earlier call could not be delivered ({self._undelivered}); "
                    "go on with a new client from a checkpoint",
                    reason="UNDELIVERED",
                )
            return await attempt()

        try:
            return await self._connection.retrying(what, checked)
        except TinsmithError as error:
            if is_retryable(error):  # and given up
                self._undelivered = self._undelivered or error
            elif isinstance(error, ResourceExhaustedError) or not error.reason:
                await self.skip(seq_id)  # too large, or refused by something before the server
            raise

    async def skip(self, seq_id: int) -> None:
        """Use up a number without any effect: later calls would wait for it for ever.

        A call without a loss is refused as invalid, and that consumes its number. Where the number
        turns out to be used already, it is a conflict, which has no effect either.
        """
        request = pb.ForwardRequest(model_id=self._model_id, seq_id=seq_id)

        async def attempt() -> None:
            async def one() -> AsyncIterator[pb.ForwardRequest]:
                yield request

            method: Any = self._connection.training().Forward
            async for _ in method(one()):
                pass

        if self._undelivered is not None:
            return
        try:
            await self._connection.retrying("skip", attempt)
        except (InvalidArgumentError, AlreadyExistsError):
            pass
        except TinsmithError as error:
            if is_retryable(error):
                self._undelivered = self._undelivered or error


def _consume(task: "asyncio.Task[Any]") -> None:
    if not task.cancelled():
        task.exception()
