"""The event loop of a server that has thousands of calls at once.

It is uvloop's, but for one thing. A thread of gRPC's tells a loop of events through a socket, a
byte for each, and grpcio takes one byte in a turn, though it looks at all events then. So bytes
pile up while the loop is busy. Once they fill the socket, at 278 of them on Linux, that thread
stops, and the kernel lets it go on when three quarters have been taken: for 208 turns no call
begins, goes on or ends, and a neighbour of two thousand calls waited for 50 to 200 ms. Here all
bytes that are there are taken in one turn.
"""

import fcntl
import functools
import socket
import sys
import termios
from collections.abc import Callable
from typing import Any, TypeVarTuple

import uvloop

Ts = TypeVarTuple("Ts")
_POLLER = "PollerCompletionQueue"
"""The class in grpcio whose method looks at events."""


class EventLoop(uvloop.Loop):
    """See above."""

    def add_reader(self, fd: Any, callback: Callable[[*Ts], Any], *args: *Ts) -> None:
        """Call back whenever there is something to read; see `asyncio`."""
        if isinstance(fd, socket.socket) and is_of_grpc(callback):
            super().add_reader(fd, functools.partial(take_all, fd, callback), *args)
            return
        super().add_reader(fd, callback, *args)


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
