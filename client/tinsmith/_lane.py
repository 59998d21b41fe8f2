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

WINDOW = 128
"""So many calls are sent before the first of them is answered. It keeps the service busy, fits into
its lane, and bounds what has to be sent again after a broken connection."""


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
        self._closed = False
        # All numbers before `_first` have ended, and those in `_ended`; only used on the loop.
        self._first = next_seq_id
        self._ended: set[int] = set()
        self._held: dict[int, asyncio.Event] = {}

    @property
    def closed(self) -> bool:
        """True once `close` was called."""
        return self._closed

    def close(self) -> None:
        """Take no more calls; those that were made go on."""
        with self._lock:
            self._closed = True

    async def ended(self) -> None:
        """Wait until all calls made so far have ended.

        Raises:
            TinsmithError: The first of them that failed.
        """
        tasks = list(self._tasks)
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        for failure in ended:
            if isinstance(failure, BaseException):
                raise failure

    def submit(
        self, count: int, start: Callable[[Sequence[int]], Coroutine[Any, Any, T]]
    ) -> "Future[T]":
        """Take the next numbers and start the calls that carry them.

        Args:
            count: How many numbers.
            start: Makes the coroutine that uses up all of them, whatever happens.
        """
        future: Future[T] = Future()
        with self._lock:  # begins in the order of the numbers, from any thread
            if self._closed:
                message = f"the client of model {self._model_id} is closed"
                raise FailedPreconditionError(message, reason="CLIENT_CLOSED")
            numbers = range(self._next_seq_id, self._next_seq_id + count)
            self._next_seq_id += count
            _loop.loop().call_soon_threadsafe(self._begin, start(numbers), numbers, future)
        return future

    def _begin(
        self, work: Coroutine[Any, Any, T], numbers: Sequence[int], future: "Future[T]"
    ) -> None:
        # Not chained to the future: whoever waits may give up at any moment; the work may not.
        task = asyncio.ensure_future(work)
        self._tasks.add(task)  # the loop itself holds tasks only weakly
        task.add_done_callback(lambda ended: self._end(ended, numbers, future))

    def _end(self, task: "asyncio.Task[T]", numbers: Sequence[int], future: "Future[T]") -> None:
        self._tasks.discard(task)
        self._move_window(numbers)
        error = None if task.cancelled() else task.exception()
        if not future.set_running_or_notify_cancel():
            return  # nobody waits any more
        if task.cancelled():
            future.set_exception(FailedPreconditionError("the client was closed"))
        elif error is not None:
            future.set_exception(error)
        else:
            future.set_result(task.result())

    async def _in_window(self, seq_id: int) -> None:
        if seq_id >= self._first + WINDOW:
            await self._held.setdefault(seq_id, asyncio.Event()).wait()

    def _move_window(self, ended: Sequence[int]) -> None:
        self._ended.update(ended)
        while self._first in self._ended:
            self._ended.remove(self._first)
            held = self._held.pop(self._first + WINDOW, None)
            self._first += 1
            if held is not None:
                held.set()

    async def _retrying(self, what: str, attempt: Callable[[], Awaitable[T]]) -> T:
        return await self._connection.retrying(what, attempt, model_id=self._model_id)

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

        await self._in_window(seq_id)
        try:
            return await self._retrying(what, checked)
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
            await self._retrying("skip", attempt)
        except (InvalidArgumentError, AlreadyExistsError):
            pass
        except TinsmithError as error:
            if is_retryable(error):
                self._undelivered = self._undelivered or error
