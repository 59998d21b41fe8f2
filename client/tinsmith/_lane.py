"""Numbers the calls of one model and gets each of them through, in order, exactly once.

A number is taken when a call is made, in the order of the program: the call is sent in a task of
its own until the service has answered it, whether or not anybody still waits for the answer.
Cancelling a future therefore leaves no gap that later calls would wait for. Work that ends in any
other way before the service has used its numbers gives them up: a call without effect uses each.
"""

import asyncio
import secrets
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import grpc

from tinsmith import _loop
from tinsmith._connection import Connection
from tinsmith._retry import is_retryable
from tinsmith.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    TinsmithError,
    UnavailableError,
)
from tinsmith.v1 import training_service_pb2 as pb

T = TypeVar("T")

WINDOW = 128
"""Maximum number of calls that are sent before the first of them is answered. It keeps the service
busy, fits into its lane, and bounds what has to be sent again after a broken connection."""

QUIET_POLL_S = 0.2
STILL_S_MAX = 90.0
"""Calls that wait longer than this without any progress wait for a number that nobody will send."""

_TAKEN = ("SEQ_ID_CONFLICT", "ANSWER_EXPIRED")
USES_NUMBER = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.DATA_LOSS,
)
"""A refusal with one of these used the call's number. After INTERNAL it is used up once more, which
has no effect where it was used."""


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
        self._stopped: TinsmithError | None = None
        self._tasks: set[asyncio.Task[BaseException | None]] = set()
        self._closed = False
        # Only used on the loop. All numbers before `_first` have ended, and those in `_ended`;
        # those in `_used` are the service's, and `_held` wait for the window.
        self._first = next_seq_id
        self._ended: set[int] = set()
        self._used: set[int] = set()
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
        failures: list[BaseException] = []
        while self._tasks:  # a call that ends may leave one behind that uses its number
            failures += filter(None, await asyncio.gather(*self._tasks))
        if failures:
            raise failures[0]

    def submit(
        self, count: int, start: Callable[[Sequence[int]], Coroutine[Any, Any, T]]
    ) -> "Future[T]":
        """Take the next numbers and start the calls that carry them.

        Args:
            count: How many numbers.
            start: Makes the coroutine that uses them. It may end in any way and at any time.

        Raises:
            FailedPreconditionError: The client is closed (CLIENT_CLOSED), or this process was
                forked (FORKED); no number is taken.
        """
        future: Future[T] = Future()
        loop = _loop.loop()
        with self._lock:  # begins in the order of the numbers, from any thread
            if self._closed:
                message = f"the client of model {self._model_id} is closed"
                raise FailedPreconditionError(message, reason="CLIENT_CLOSED")
            numbers = range(self._next_seq_id, self._next_seq_id + count)
            loop.call_soon_threadsafe(self._begin, start, numbers, future)
            self._next_seq_id += count
        return future

    def _begin(
        self,
        start: Callable[[Sequence[int]], Coroutine[Any, Any, T]],
        numbers: Sequence[int],
        future: "Future[T]",
    ) -> None:
        # Not chained to the future: whoever waits may give up at any moment; the work may not.
        self._spawn(self._work(start, numbers, future))

    def _spawn(self, work: Coroutine[Any, Any, BaseException | None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)  # the loop itself holds tasks only weakly
        task.add_done_callback(self._tasks.discard)

    async def _work(
        self,
        start: Callable[[Sequence[int]], Coroutine[Any, Any, T]],
        numbers: Sequence[int],
        future: "Future[T]",
    ) -> BaseException | None:
        result: Any = None
        error: BaseException | None = None
        try:
            result = await start(numbers)
        except asyncio.CancelledError:
            error = FailedPreconditionError("the client was closed", reason="CLIENT_CLOSED")
        except BaseException as raised:  # also what would end the loop, and every call with it
            error = raised
        self._move_window(numbers)
        for seq_id in numbers:
            if seq_id in self._used:
                self._used.remove(seq_id)
            else:
                self._spawn(self._give_up(seq_id))
        if future.set_running_or_notify_cancel():  # else nobody waits any more
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)
        return error

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

    async def call(self, what: str, seq_id: int, attempt: Callable[[], Awaitable[T]]) -> T:
        """Send one numbered call until it is answered.

        Args:
            what: Names the call in messages.
            seq_id: Its number.
            attempt: Sends it once.

        Raises:
            TinsmithError: The answer. After a call that could not be delivered at all, and once
                another client uses the model, every later one: their effects would be out of order.
        """

        async def checked() -> T:
            if self._stopped is not None:
                raise FailedPreconditionError(
                    f"{what}: an earlier call could not be delivered ({self._stopped}); "
                    "go on with a new client, from a checkpoint or by get_training_client",
                    reason="UNDELIVERED",
                )
            return await attempt()

        await self._in_window(seq_id)
        try:
            result = await self._connection.retrying(what, checked, model_id=self._model_id)
        except TinsmithError as error:
            if error.reason and error.code in USES_NUMBER:
                self._used.add(seq_id)
            if error.reason in _TAKEN:
                self._stopped = self._stopped or error
                raise FailedPreconditionError(
                    f"{what}: another client goes on with model {self._model_id}: {error}",
                    reason=error.reason,
                    code=error.code,
                ) from None
            if is_retryable(error):  # and given up
                self._stopped = self._stopped or error
            raise
        self._used.add(seq_id)
        return result

    async def _give_up(self, seq_id: int) -> None:
        """Use up a number without any effect: later calls would wait for it for ever.

        Where the number turns out to be used already, it is a conflict, which has no effect either.
        """
        if self._stopped is not None:
            return
        try:
            await use_up(self._connection, self._model_id, seq_id)
        except TinsmithError as error:
            if is_retryable(error):
                self._stopped = self._stopped or error


async def use_up(connection: Connection, model_id: str, seq_id: int, name: str = "") -> bool:
    """Use a number for nothing: a save of no kind is refused, and that consumes its number.

    Args:
        connection: Where to.
        model_id: Which model.
        seq_id: The number.
        name: Makes the call another one than any other client's.

    Returns:
        Whether this call used it, and no other one did before.
    """
    request = pb.SaveCheckpointRequest(model_id=model_id, seq_id=seq_id, name=name)

    async def attempt() -> None:
        await connection.training().SaveCheckpoint(request)

    try:
        await connection.retrying("skip", attempt, model_id=model_id)
    except InvalidArgumentError:
        return True
    except (AlreadyExistsError, FailedPreconditionError) as error:
        if error.reason not in _TAKEN:
            raise
    return False


async def attach(connection: Connection, model_id: str) -> tuple[pb.Model, int]:
    """Take over the numbering of an existing model's calls from whoever had it.

    Waits until the calls that the service was sent before have ended, so that none of them takes
    effect behind the first call of the new client, and then uses one number in a way that no other
    client's call can be taken for: one that still goes on with its own numbers hears of it.

    Returns:
        The model, and the number of the next call.
    """
    request = pb.GetModelRequest(model_id=model_id)
    seen: dict[int, float] = {}

    async def ask() -> pb.Model:
        return (await connection.training().GetModel(request)).model

    async def quiet() -> pb.Model:
        model = await ask()
        now_s = asyncio.get_running_loop().time()
        if model.pending_calls and now_s - seen.setdefault(model.next_seq_id, now_s) < STILL_S_MAX:
            message = f"{model.pending_calls} calls of another client are under way"
            error = UnavailableError(message, reason="PENDING_CALLS", retry_after_s=QUIET_POLL_S)
            raise error
        return model

    name = f"attached-{secrets.token_hex(8)}"
    while True:
        model = await connection.retrying("get_training_client", quiet, model_id=model_id)
        seq_id = model.next_seq_id
        if await use_up(connection, model_id, seq_id, name):
            after = await connection.retrying("get_training_client", ask, model_id=model_id)
            if after.next_seq_id == seq_id + 1:  # else calls came in that had waited for this one
                return after, after.next_seq_id
