"""The one background thread on which this process's clients talk to servers."""

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_lock = threading.Lock()
_running: tuple[int, asyncio.AbstractEventLoop, threading.Thread] | None = None


def loop() -> asyncio.AbstractEventLoop:
    """The loop; it is started on first use, and again in a forked process."""
    global _running
    with _lock:
        if _running is None or _running[0] != os.getpid():
            new = asyncio.new_event_loop()
            thread = threading.Thread(target=new.run_forever, name="tinsmith", daemon=True)
            thread.start()
            _running = (os.getpid(), new, thread)
        return _running[1]


def run(coroutine: Coroutine[Any, Any, T]) -> "concurrent.futures.Future[T]":
    """Start a coroutine on the loop, from any thread."""
    return asyncio.run_coroutine_threadsafe(coroutine, loop())


def in_loop_thread() -> bool:
    """True on the background thread itself, where waiting would wait for ever."""
    return _running is not None and threading.current_thread() is _running[2]
