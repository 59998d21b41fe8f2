"""What gRPC itself takes for a call of row 11: the same bytes over the same two hops, no more.

A client sends pieces to a relay; a sink, which holds a stream to the relay open as a rank does,
gets them as one message, works for a while, answers with some bytes, and the relay passes them on.
All three are processes of their own, serialise nothing, look at nothing and write nothing down.

    python -m bench.bare_hops relay                             # prints its port
    python -m bench.bare_hops sink ADDRESS SECONDS ANSWER_BYTES
"""

import asyncio
import contextlib
import queue
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import grpc
import numpy as np

from tinsmithd.processes import keep_freed_memory

CALL, ATTACH = "/bare.Hops/Call", "/bare.Hops/Attach"
_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def overheads_s(
    pieces: Sequence[bytes], answer_bytes: int, work_s: float, warm_ups: int, calls: int
) -> np.ndarray:
    """Seconds of each call less those that the sink worked.

    Args:
        pieces: What the client sends.
        answer_bytes: How much the sink answers.
        work_s: Seconds that it works.
        warm_ups: Calls before those that count.
        calls: Calls that count.
    """
    with _running("relay") as relay:
        assert relay.stdout is not None
        address = f"127.0.0.1:{relay.stdout.readline().strip()}"
        with _running("sink", address, str(work_s), str(answer_bytes)):
            return _measure(address, pieces, warm_ups, calls)


@contextlib.contextmanager
def _running(*arguments: str) -> "Iterator[subprocess.Popen[str]]":
    command = [sys.executable, "-m", "bench.bare_hops", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _measure(address: str, pieces: Sequence[bytes], warm_ups: int, calls: int) -> np.ndarray:
    seconds = []
    with grpc.insecure_channel(address, options=_OPTIONS) as channel:
        call: Any = channel.stream_stream(CALL)
        for _ in range(warm_ups + calls):
            start_s = time.perf_counter()
            *_, worked = call(iter(pieces), wait_for_ready=True)
            seconds.append(time.perf_counter() - start_s - float(worked))
    return np.array(seconds[warm_ups:])


class _Relay:
    """Passes calls to the sink, one at a time, and its answers back."""

    def __init__(self) -> None:
        self._to_sink: asyncio.Queue[bytes] = asyncio.Queue()
        self._from_sink: asyncio.Queue[bytes] = asyncio.Queue()
        self._attached = asyncio.Event()

    async def call(self, pieces: AsyncIterator[bytes], _: Any) -> AsyncIterator[bytes]:
        await self._attached.wait()
        self._to_sink.put_nowait(b"".join([piece async for piece in pieces]))
        for _ in range(2):  # the answer, and how long it took to work
            yield await self._from_sink.get()

    async def attach(self, answers: AsyncIterator[bytes], _: Any) -> AsyncIterator[bytes]:
        async def read() -> None:
            async for answer in answers:
                self._from_sink.put_nowait(answer)

        reader = asyncio.create_task(read())
        self._attached.set()
        try:
            while True:
                yield await self._to_sink.get()
        finally:
            reader.cancel()


async def _serve() -> None:
    relay = _Relay()
    server = grpc.aio.server(options=_OPTIONS)
    methods = {
        path.rpartition("/")[2]: grpc.stream_stream_rpc_method_handler(method)
        for path, method in ((CALL, relay.call), (ATTACH, relay.attach))
    }
    service = CALL.split("/")[1]
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, methods)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


def _sink(address: str, work_s: float, answer_bytes: int) -> None:
    answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def outgoing() -> Iterator[bytes]:
        while True:
            yield answers.get()

    answer, sum_of = bytes(answer_bytes), np.ones(1 << 16, np.float32)
    with grpc.insecure_channel(address, options=_OPTIONS) as channel:
        attach: Any = channel.stream_stream(ATTACH)
        for _ in attach(outgoing()):
            start_s = time.perf_counter()
            while time.perf_counter() - start_s < work_s:
                sum_of.sum()
            answers.put(answer)
            answers.put(f"{time.perf_counter() - start_s:.6f}".encode())


def main() -> None:
    """Be the relay or the sink."""
    keep_freed_memory()
    match sys.argv[1:]:
        case ["relay"]:
            asyncio.run(_serve())
        case ["sink", address, work_s, answer_bytes]:
            _sink(address, float(work_s), int(answer_bytes))


if __name__ == "__main__":
    main()
