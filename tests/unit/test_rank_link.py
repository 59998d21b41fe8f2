"""Rank 0's end of its stream, against a server that a test plays itself."""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from tinsmith.internal.v1 import trainer_link_service_pb2 as pb
from tinsmith.internal.v1.trainer_link_service_pb2_grpc import (
    TrainerLinkServiceServicer,
    add_TrainerLinkServiceServicer_to_server,
)
from tinsmithd.rpc import link_secret
from tinsmithd.trainer import link

HELLO = pb.AttachRequest(hello=pb.Hello(world_size=1, engine="none"))
WAIT_S = 20


class Stream:
    """One stream as the server sees it."""

    def __init__(self, requests: Iterator[pb.AttachRequest], context: Any, *, reads: bool) -> None:
        self._outgoing: queue.SimpleQueue[pb.AttachResponse | grpc.StatusCode | None] = (
            queue.SimpleQueue()
        )
        self._incoming: queue.SimpleQueue[pb.AttachRequest] = queue.SimpleQueue()
        self._context = context
        self.first = next(requests)
        if reads:
            threading.Thread(target=self._read, args=(requests,), daemon=True).start()

    def _read(self, requests: Iterator[pb.AttachRequest]) -> None:
        with contextlib.suppress(Exception):
            for request in requests:
                self._incoming.put(request)

    def responses(self) -> Iterator[pb.AttachResponse]:
        while (response := self._outgoing.get()) is not None:
            if isinstance(response, grpc.StatusCode):
                self._context.abort(response, "another group has its place")
            yield response

    def say(self, response: pb.AttachResponse) -> None:
        self._outgoing.put(response)

    def welcome(self, epoch: int) -> None:
        self.say(pb.AttachResponse(welcome=pb.Welcome(epoch=epoch)))

    def step(self, command_id: int) -> None:
        self.say(pb.AttachResponse(command_id=command_id, optim_step=pb.OptimStep()))

    def end(self, code: grpc.StatusCode | None = None) -> None:
        self._outgoing.put(code)

    def heard(self, kind: str) -> pb.AttachRequest:
        """The next message of a kind; signs of life in between are skipped."""
        while True:
            request = self._incoming.get(timeout=WAIT_S)
            if request.WhichOneof("content") == kind:
                return request
            assert request.WhichOneof("content") == "alive"


class Server(TrainerLinkServiceServicer):
    """Hands streams to a test.

    Attributes:
        reads: Whether it reads anything after a stream's first message.
    """

    def __init__(self, secret_file: Path) -> None:
        self.reads = True
        self._streams: queue.SimpleQueue[Stream] = queue.SimpleQueue()
        self.grpc = grpc.server(futures.ThreadPoolExecutor(8))
        add_TrainerLinkServiceServicer_to_server(self, self.grpc)
        port = self.grpc.add_insecure_port("127.0.0.1:0")
        self.target = link.LinkTarget(f"127.0.0.1:{port}", str(secret_file))
        self.grpc.start()

    def Attach(
        self, request_iterator: Iterator[pb.AttachRequest], context: Any
    ) -> Iterator[pb.AttachResponse]:
        stream = Stream(request_iterator, context, reads=self.reads)
        # Also one that begins after a test's last look: its thread would wait for ever, and the
        # process of the tests for its threads.
        if not context.add_callback(stream.end):
            stream.end()
        self._streams.put(stream)
        return stream.responses()

    def attached(self) -> Stream:
        stream = self._streams.get(timeout=WAIT_S)
        assert stream.first == HELLO
        return stream


class Pretender:
    """Commands that are carried out by waiting until the test lets them go.

    Attributes:
        applied: Numbers of the commands, as they began.
        forgotten_count: How often the models were dropped.
    """

    def __init__(self) -> None:
        self.applied: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.go = threading.Event()
        self.go.set()
        self.forgotten_count = 0
        self.dropped: list[bool] = []

    def apply(
        self,
        command: pb.AttachResponse,
        reply: Callable[[pb.AttachRequest], None],
        later: Callable[[pb.AttachRequest], bool],
    ) -> None:
        self.applied.put(command.command_id)
        if command.HasField("copy_state"):
            piece = pb.StatePiece(data=bytes(1024 * 1024))
            while later(pb.AttachRequest(command_id=command.command_id, piece=piece)):
                pass
            self.dropped.append(True)
            return
        assert self.go.wait(WAIT_S)
        reply(pb.AttachRequest(command_id=command.command_id, done=pb.Done()))

    def forget_models(self) -> None:
        self.forgotten_count += 1


class End(Exception):
    """Ends the loop of a rank that would attach again for ever."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(link_secret.made_in(tmp_path))
    yield made
    made.grpc.stop(0).wait()


@pytest.fixture
def commands() -> Pretender:
    return Pretender()


@pytest.fixture
def broadcasts(server: Server, commands: Pretender) -> Iterator[list[bytes]]:
    """Runs rank 0; what it told the other ranks."""
    told: list[bytes] = []
    links: list[link.Link] = []
    over = threading.Event()

    def broadcast(data: bytes | None) -> bytes:
        assert data is not None
        if over.is_set():
            raise End
        told.append(data)
        return data

    def run() -> None:
        with contextlib.suppress(End):
            link.lead(commands, server.target, HELLO, broadcast, links.append)  # type: ignore[arg-type]

    thread = threading.Thread(target=run)
    thread.start()
    yield told
    over.set()
    server.grpc.stop(0).wait()
    # Some 1 in 1,000 times grpc's synchronous server does not end a stream that comes as it stops;
    # of a process that ends nothing is left to wait for.
    while thread.is_alive():
        links[-1].close()
        thread.join(0.1)


def test_it_stands_by_until_it_is_welcomed(
    server: Server,
    commands: Pretender,
    broadcasts: list[bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The welcome is for rank 0 alone; a command reaches every rank in the bytes that came."""
    caplog.set_level(logging.INFO)
    stream = server.attached()
    stream.heard("alive")
    assert commands.applied.empty()
    stream.welcome(41)
    stream.step(1)
    assert stream.heard("done").command_id == 1
    step = pb.AttachResponse(command_id=1, optim_step=pb.OptimStep())
    assert broadcasts == [step.SerializeToString()]
    assert "at work, in epoch 41" in caplog.text
    stream.end()


def test_it_says_that_it_lives_while_it_computes(
    monkeypatch: pytest.MonkeyPatch, server: Server, commands: Pretender, request: Any
) -> None:
    """Again and again, from hello on, until the command is done."""
    monkeypatch.setattr(link, "ALIVE_INTERVAL_S", 0.02)
    request.getfixturevalue("broadcasts")
    stream = server.attached()
    stream.welcome(1)
    commands.go.clear()
    stream.step(1)
    assert commands.applied.get(timeout=WAIT_S) == 1
    for _ in range(5):
        assert stream.heard("alive").command_id == 0
    commands.go.set()
    assert stream.heard("done").command_id == 1
    stream.end()


@pytest.mark.parametrize("code", [None, grpc.StatusCode.FAILED_PRECONDITION])
def test_a_group_that_lost_its_place_begins_anew(
    server: Server,
    commands: Pretender,
    broadcasts: list[bytes],
    caplog: pytest.LogCaptureFixture,
    code: grpc.StatusCode | None,
) -> None:
    """It finishes what it was at, as one that was stopped for a while does; nobody hears of it. All
    ranks drop their models before it attaches again."""
    stream = server.attached()
    stream.welcome(1)
    commands.go.clear()
    stream.step(1)
    stream.step(2)
    assert commands.applied.get(timeout=WAIT_S) == 1
    stream.end(code)
    commands.go.set()
    again = server.attached()
    assert commands.forgotten_count == 1
    assert broadcasts[-1] == b""
    again.welcome(2)
    again.step(3)
    assert again.heard("done").command_id == 3
    if code is not None:
        assert "FAILED_PRECONDITION: another group has its place" in caplog.text
    again.end()


def test_a_stream_that_breaks_holds_nobody_up(
    server: Server, commands: Pretender, broadcasts: list[bytes]
) -> None:
    """A snapshot that cannot be sent, since the server reads nothing, ends with the stream."""
    server.reads = False
    stream = server.attached()
    stream.welcome(1)
    stream.say(pb.AttachResponse(command_id=1, copy_state=pb.CopyState()))
    assert commands.applied.get(timeout=WAIT_S) == 1
    server.reads = True
    stream.end(grpc.StatusCode.UNAVAILABLE)
    again = server.attached()
    assert commands.dropped == [True]
    again.end()


def test_it_waits_longer_only_where_nothing_answers(
    monkeypatch: pytest.MonkeyPatch, server: Server, request: Any
) -> None:
    """Twice as long each time; 0.2 s after a stream on which it was at work."""
    delays: list[float] = []
    clock = SimpleNamespace(sleep=delays.append, monotonic=lambda: 0.0)
    monkeypatch.setattr(link, "time", clock)
    monkeypatch.setattr(link, "random", SimpleNamespace(uniform=lambda low, high: 1.0))
    request.getfixturevalue("broadcasts")
    for epoch in (0, 0, 0, 0, 0, 0, 0, 1, 0):
        stream = server.attached()
        if epoch:
            stream.welcome(epoch)
            stream.step(1)
            stream.heard("done")
        stream.end(grpc.StatusCode.UNAVAILABLE)
    server.attached().end()
    assert delays[:9] == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 0.2, 0.4]
