"""Numbers the calls of one model and gets each of them through, in order, exactly once.

A number is taken when a call is made, in the order of the program, and is never given up: the
call is sent in a task of its own until the service has answered it, whether or not anybody still
waits for the answer. Cancelling a future therefore leaves no hole that later calls would wait for.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from tinsmith import _loop
from tinsmith._connection import Connection
from tinsmith._retry import is_retryable
from tinsmith.errors import FailedPreconditionError, TinsmithError

T = TypeVar("T")


class Lane:
    """The calls of one model.

    Args:
        connection: Where to.
        next_seq_id: Number of the first call.
    """

    def __init__(self, connection: Connection, next_seq_id: int) -> None:
        self._connection = connection
        self._next_seq_id = next_seq_id
        self._lock = threading.Lock()
        self._undelivered: TinsmithError | None = None

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
        return await asyncio.shield(task)

    async def call(self, what: str, attempt: Callable[[], Awaitable[T]]) -> T:
        """Send one numbered call until it is answered.

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
            raise


def _consume(task: "asyncio.Task[Any]") -> None:
    if not task.cancelled():
        task.exception()
