"""One thread for one thing that must not be done by two: half the way of an executor."""

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
Work = tuple[Callable[[], Any], "asyncio.Future[Any]", asyncio.AbstractEventLoop]


class OwnThread:
    """Runs functions one after the other; its thread ends with it.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str) -> None:
        self._queue: SimpleQueue[Work | None] = SimpleQueue()
        # Daemonic, and without this object: whoever forgets to close it leaves no thread behind.
        self._thread = threading.Thread(target=_work, args=(self._queue,), name=name, daemon=True)
        self._end = weakref.finalize(self, self._queue.put, None)
        self._end.atexit = False

    def run(self, function: Callable[[], T]) -> "asyncio.Future[T]":
        """Run a function; what is given has its result. It runs even if that is cancelled.

        Raises:
            RuntimeError: It is closed.
        """
        if not self._end.alive:
            raise RuntimeError("the thread has ended")
        if self._thread.ident is None:
            self._thread.start()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._queue.put((function, future, loop))
        return future

    def close(self) -> None:
        """Wait until all of it is done; nothing more can be run."""
        self._end()
        if self._thread.ident is not None:
            self._thread.join()


def _work(queue: "SimpleQueue[Work | None]") -> None:
    while (work := queue.get()) is not None:
        function, future, loop = work
        result = error = None
        try:
            result = function()
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
            loop.call_soon_threadsafe(_settle, future, result, error)
        del work, function, future, loop, result, error  # nothing is kept until more comes


def _settle(future: "asyncio.Future[Any]", result: Any, error: BaseException | None) -> None:
    if future.done():  # cancelled
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
