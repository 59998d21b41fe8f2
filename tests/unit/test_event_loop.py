"""How gRPC wakes the event loop of a busy server."""

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tinsmithd.config import SamplerConfig
from tinsmithd.processes.event_loop import (
    FIRST_MAX,
    EventLoop,
    go_first,
    is_of_grpc,
    take_all,
    take_turns,
)
from tinsmithd.rpc.server import RpcServer


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


class PollerCompletionQueue:
    """What grpcio looks at events with, by name: here each byte is one event."""

    def __init__(self, wakes: socket.socket, done: Callable[[], object]) -> None:
        self._wakes, self._done = wakes, done

    def look(self) -> None:
        """Take the byte, and do what came."""
        self._wakes.recv(1)
        self._done()


def in_order(task: Callable[["asyncio.Future[None]"], Any]) -> list[str]:
    """What happened, in order, once an event came for a task; others always have a turn to take."""
    said: list[str] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        event = loop.create_future()

        async def other() -> None:
            while True:
                said.append("other")
                await asyncio.sleep(0)

        async def own() -> None:
            await task(event)
            said.append("own")

        def look() -> None:
            said.append("event")
            event.set_result(None)

        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            loop.add_reader(ours, PollerCompletionQueue(ours, look).look)
            others = [asyncio.create_task(other()) for _ in range(9)]
            waiting = asyncio.create_task(own())
            for _ in range(20):
                await asyncio.sleep(0)
            theirs.send(b"1")
            await waiting
            loop.remove_reader(ours)
            for each in others:
                each.cancel()

    with asyncio.Runner(loop_factory=EventLoop) as runner:
        runner.run(main())
    return said[said.index("event") : said.index("own") + 1]


async def some_steps(event: "asyncio.Future[None]") -> None:
    """Several steps, as those of a call: a task that is made, waited for, and one more turn."""

    async def more() -> None:
        await asyncio.sleep(0)

    await event
    await asyncio.create_task(more())
    await asyncio.wait([asyncio.create_task(more())])


def test_what_goes_first_is_done_in_the_turn_of_its_event() -> None:
    """All its steps, before any of those that wait for their turn."""

    async def first(event: "asyncio.Future[None]") -> None:
        go_first()
        await some_steps(event)

    assert in_order(first) == ["event", "own"]


@pytest.mark.parametrize("said", [True, False])
def test_all_else_waits_for_its_turn(*, said: bool) -> None:
    """Also what went first so far."""

    async def usual(event: "asyncio.Future[None]") -> None:
        if said:
            go_first()
            take_turns()
        await some_steps(event)

    assert in_order(usual).count("other") >= 9


def test_nobody_goes_first_for_ever() -> None:
    """Others have their turn beside one that always has something to do."""

    async def endless(event: "asyncio.Future[None]") -> None:
        go_first()
        await event
        for _ in range(3 * FIRST_MAX):
            await asyncio.sleep(0)

    assert in_order(endless).count("other") >= 9


class Seen(health.aio.HealthServicer):  # type: ignore[misc]  # untyped base
    """Tells in how many turns of others each call was answered, from its first step on."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = 0
        self.found: dict[str, int] = {}

    async def Check(self, request: Any, context: Any) -> Any:
        """Count, and answer."""
        return await self._counted("Check", super().Check, request, context)

    async def Watch(self, request: Any, context: Any) -> Any:
        """Count, and end."""

        async def nothing(request: Any, context: Any) -> None:
            await asyncio.sleep(0)

        await self._counted("Watch", nothing, request, context)

    async def _counted(self, name: str, behavior: Any, request: Any, context: Any) -> Any:
        before = self.turns
        for _ in range(8):
            await asyncio.sleep(0)
        answer = await behavior(request, context)
        self.found[name] = self.turns - before
        return answer


def test_a_question_for_health_goes_first_and_no_other_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Through the wire, with a server as all of ours."""

    async def main() -> dict[str, int]:
        seen = Seen()
        monkeypatch.setattr(health.aio, "HealthServicer", lambda: seen)
        server = RpcServer(SamplerConfig(listen_address="127.0.0.1:0", base_model="a"), "a")

        async def others() -> None:
            while True:
                seen.turns += 1
                await asyncio.sleep(0)

        await server.start()
        turning = asyncio.create_task(others())
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest()
            assert (await stub.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
            assert [answer async for answer in stub.Watch(request)] == []
        turning.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await turning
        await server.stop()
        return seen.found

    with asyncio.Runner(loop_factory=EventLoop) as runner:
        found = runner.run(main())
    assert found["Check"] == 0
    assert found["Watch"] >= 8
