"""The one background thread on which this process's clients talk to servers."""

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from tinsmith import _fork

T = TypeVar("T")

_lock = threading.Lock()
_running: tuple[asyncio.AbstractEventLoop, threading.Thread] | None = None


def loop() -> asyncio.AbstractEventLoop:
    """The loop; it is started on first use.

    Raises:
        FailedPreconditionError: This process was forked from one that had it (FORKED).
    """
    global _running
    _fork.use()
    with _lock:
        if _running is None:
            new = asyncio.new_event_loop()
            thread = threading.Thread(target=new.run_forever, name="tinsmith", daemon=True)
            thread.start()
            _running = (new, thread)
        return _running[0]


def run(coroutine: Coroutine[Any, Any, T]) -> "concurrent.futures.Future[T]":
    """Start a coroutine on the loop, from any thread; errors as `loop`."""
    try:
        return asyncio.run_coroutine_threadsafe(coroutine, loop())
    except BaseException:
        coroutine.close()  # it will not run, and nobody should be warned of that
        raise


def in_loop_thread() -> bool:
    """True on the background thread itself, where waiting would wait for ever."""
    return _running is not None and threading.current_thread() is _running[1]
