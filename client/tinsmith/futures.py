"""What every call over the network returns at once: a future for sync and async code.

result = client.forward_backward(data, "cross_entropy").result()     # in a script
result = await client.forward_backward(data, "cross_entropy")        # in a coroutine
"""

import asyncio
import concurrent.futures
import contextlib
import weakref
from collections.abc import Callable, Coroutine, Generator, Iterator
from typing import Any, Generic, TypeVar

from tinsmith import _fork, _loop

T = TypeVar("T")


class APIFuture(Generic[T]):
    """The result of a call that is under way.

    It may be waited for from any thread and any event loop, any number of times. Whoever stops
    waiting, by a timeout or by being cancelled, leaves it to the others.
    """

    def __init__(self, future: "concurrent.futures.Future[T]") -> None:
        self._future = future
        self._wakes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Event]
        self._wakes = weakref.WeakKeyDictionary()

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result.

        Args:
            timeout: Seconds; None waits as long as it takes.

        Raises:
            TimeoutError: It is not there yet; the call goes on.
            TinsmithError: The call failed.
        """
        self._check()
        if _loop.in_loop_thread() and not self._future.done():
            raise RuntimeError("result() would block the client's own event loop; use await")
        return self._future.result(timeout)

    async def result_async(self, timeout: float | None = None) -> T:
        """Wait for the result in a coroutine.

        Raises:
            TimeoutError: It is not there yet; the call goes on.
            TinsmithError: The call failed.
        """
        self._check()
        if not self._future.done():
            async with asyncio.timeout(timeout):
                await self._wake().wait()
        if self._future.cancelled():
            raise asyncio.CancelledError
        return self._future.result()

    def _wake(self) -> asyncio.Event:
        # Not `wrap_future`: to cancel its waiter would cancel the call for everybody.
        loop = asyncio.get_running_loop()
        if loop not in self._wakes:
            done = self._wakes[loop] = asyncio.Event()

            def wake(_: "concurrent.futures.Future[T]") -> None:
                with contextlib.suppress(RuntimeError):  # the loop was closed; nobody waits there
                    loop.call_soon_threadsafe(done.set)

            self._future.add_done_callback(wake)
        return self._wakes[loop]

    def _check(self) -> None:
        if not self._future.done():  # in a forked process it never will be
            _fork.check()

    def future(self) -> "concurrent.futures.Future[T]":
        """The same as a standard future. Cancelling it gives up the result, for everybody."""
        return self._future

    def coroutine(self) -> Coroutine[Any, Any, T]:
        """The same as a coroutine, for `asyncio.create_task`."""
        return self.result_async()

    def __await__(self) -> Generator[Any, Any, T]:
        return self.result_async().__await__()


class CustomLossFuture(APIFuture[T]):
    """Also unpacks: `loss, metrics = client.forward_backward_custom(...)` waits and unpacks."""

    def __iter__(self) -> Iterator[Any]:
        result: Any = self.result()
        return iter(result)


class WaitableFuture(APIFuture[T], concurrent.futures.Future):  # type: ignore[type-arg]
    """Also a standard future, for `concurrent.futures.wait` and `as_completed`."""

    def __init__(self, future: "concurrent.futures.Future[T]") -> None:
        concurrent.futures.Future.__init__(self)
        APIFuture.__init__(self, future)
        self._future.add_done_callback(self._take)

    def _take(self, source: "concurrent.futures.Future[T]") -> None:
        if source.cancelled():
            concurrent.futures.Future.cancel(self)
        if not self.set_running_or_notify_cancel():
            return
        if (error := source.exception()) is not None:
            self.set_exception(error)
        else:
            self.set_result(source.result())

    def result(self, timeout: float | None = None) -> T:
        """As `APIFuture.result`."""
        return APIFuture.result(self, timeout)

    def cancel(self) -> bool:
        """Give up the result, for everybody; False once it is there."""
        return self._future.cancel()


class ClientFuture(APIFuture[T]):
    """A future of a client that can also be used as the client: its attributes wait for it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.result(), name)


def mapped(future: APIFuture[Any], read: Callable[[Any], T]) -> APIFuture[T]:
    """A future of what `read` makes of another one's result."""

    async def later() -> T:
        return read(await future)

    return APIFuture(_loop.run(later()))


def done(value: T) -> APIFuture[T]:
    """A future that has its result already."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()
    future.set_result(value)
    return APIFuture(future)
