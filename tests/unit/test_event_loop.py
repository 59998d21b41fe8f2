"""How gRPC wakes the event loop of a busy server."""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import grpc

from tinsmithd.processes.event_loop import EventLoop, is_of_grpc, take_all


def test_all_that_wakes_the_loop_is_taken_in_one_turn() -> None:
    """Else gRPC's thread waits for the loop to take a byte in each of hundreds of turns."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    looked = []
    with ours, theirs:
        for waiting in (1, 2, 200):
            theirs.sendall(bytes(waiting))
            take_all(ours, lambda *args: looked.append((ours.recv(1), args)), "loop")
            theirs.sendall(b"1")  # it comes while events are looked at, and wakes once more
            assert ours.recv(2) == b"1"
    assert looked == [(b"\0", ("loop",))] * 3


def test_what_grpc_is_woken_by_is_known() -> None:
    """A release of grpcio that does it otherwise shows here."""
    readers: list[Callable[..., Any]] = []

    class Seen(EventLoop):
        def add_reader(self, fd: Any, callback: Callable[..., Any], *args: Any) -> None:
            readers.append(callback)
            super().add_reader(fd, callback, *args)

    async def server() -> None:
        made = grpc.aio.server()
        await made.start()
        await made.stop(None)

    with asyncio.Runner(loop_factory=Seen) as runner:
        runner.run(server())
    assert [is_of_grpc(each) for each in readers].count(True) == 1
    assert not is_of_grpc(print)
