"""The event loop of a server that has thousands of calls at once.

It is uvloop's, but for two things.

A thread of gRPC's tells a loop of events through a socket, a byte for each, and grpcio takes one
byte in a turn, though it looks at all events then. So bytes pile up while the loop is busy. Once
they fill the socket, at 278 of them on Linux, that thread stops, and the kernel lets it go on when
three quarters have been taken: for 208 turns no call begins, goes on or ends, and a neighbour of
two thousand calls waited for 50 to 200 ms. Here all bytes that are there are taken in one turn.

And what is short goes first. To answer a probe that asks for health takes some ten steps in as many
turns, in each of which thousands of others have something to do. What a task that goes first has to
do next is done in the same turn, right after the look at events that made it possible.
"""

import asyncio
import fcntl
import functools
import socket
import sys
import termios
from collections import deque
from collections.abc import Callable
from contextvars import Context, ContextVar
from typing import Any, TypeVarTuple

import uvloop

Ts = TypeVarTuple("Ts")
_POLLER = "PollerCompletionQueue"
"""The class in grpcio whose method looks at events."""
FIRST_MAX = 64
"""Steps of those that go first, in one turn: all others have their turn, whoever asks for what."""
_goes_first = ContextVar("goes_first", default=False)


def go_first() -> None:
    """Let the task that says so go before others, and those that it makes from now on.

    It is for tasks that have little to do. On other loops than `EventLoop` nothing happens.
    """
    _goes_first.set(True)


def take_turns() -> None:
    """Let the task that says so wait for its turn, as most do, and those that it makes."""
    _goes_first.set(False)


class EventLoop(uvloop.Loop):
    """See above."""

    def __init__(self) -> None:
        super().__init__()
        self._first: deque[asyncio.Handle] = deque()

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """Call back in the next turn, or earlier where it is for one that goes first."""
        if context is None or not context.get(_goes_first):
            return super().call_soon(callback, *args, context=context)
        handle = asyncio.Handle(callback, args, self, context)
        self._first.append(handle)
        super().call_soon(self._run_first)  # whether or not events come before
        return handle

    def add_reader(self, fd: Any, callback: Callable[[*Ts], Any], *args: *Ts) -> None:
        """Call back whenever there is something to read; see `asyncio`."""
        if isinstance(fd, socket.socket) and is_of_grpc(callback):
            super().add_reader(fd, self._look, fd, callback, *args)
            return
        super().add_reader(fd, callback, *args)

    def _look(self, wakes: socket.socket, callback: Callable[..., Any], *args: Any) -> None:
        take_all(wakes, callback, *args)
        self._run_first()

    def _run_first(self) -> None:
        for _ in range(FIRST_MAX):
            if not self._first:
                return
            self._first.popleft()._run()


def is_of_grpc(callback: Callable[..., Any]) -> bool:
    """Whether it is what grpcio has called when there are events."""
    function = callback.func if isinstance(callback, functools.partial) else callback
    return type(getattr(function, "__self__", None)).__name__ == _POLLER


def waiting_bytes(sock: socket.socket) -> int:
    """Bytes that can be read at once."""
    count = bytearray(4)
    fcntl.ioctl(sock, termios.FIONREAD, count)
    return int.from_bytes(count, sys.byteorder)


def take_all(wakes: socket.socket, callback: Callable[..., Any], *args: Any) -> None:
    """Take all bytes but the last one, which `callback` takes."""
    # What comes after this wakes the loop again, so no event is forgotten: a byte is written once
    # its event can be seen.
    more = waiting_bytes(wakes) - 1
    if more > 0:
        wakes.recv(more)
    callback(*args)
