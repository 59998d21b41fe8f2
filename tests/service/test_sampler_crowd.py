"""Two thousand calls at once: all end, others are answered between them, the memory comes back."""

import asyncio
import threading
from pathlib import Path

import grpc
import numpy as np
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sampler_server import sample_request, sampler_process
from tinsmith.tensors import decode
from tinsmith.v1.sampler_service_pb2_grpc import SamplerServiceStub
from tinsmithd.sampler.server import SERVICE_NAME

CALLS = 2000
NEW_TOKENS = 8
ENDED_MAX = CALLS // 2
"""Calls that may end between somebody's question and its answer. A server that takes in, or
answers, all of them before it looks at anything else has all of them; tens are usual, and where the
machine is busy hundreds reach this client together with the answer. `make bench ROWS=crowd` says
how many milliseconds it is."""
GREW_BYTES_MAX = CALLS * 20_000
"""A crowd finds the room of the one before, but for what an allocator scatters."""
CROWDS_MAX = 4
"""What leaks does so with each crowd; what is scattered, with one or another where the machine is
busy."""
LOCAL = (("grpc.use_local_subchannel_pool", 1),)
"""A connection of its own."""


async def sampled(stub: SamplerServiceStub, seed: int, ended: list[int]) -> int:
    """The tokens that a call gave."""
    request = sample_request(params={"seed": seed, "max_tokens": NEW_TOKENS})
    made = sum(
        [len(decode(d.tokens)) async for response in stub.Sample(request) for d in response.deltas]
    )
    ended.append(seed)
    return made


def asked(address: str, ended: list[int], over: threading.Event) -> list[int]:
    """Ask for the server's health, again and again; how many calls ended before each answer.

    On a thread of its own: the event loop hears of hundreds of calls before it hears of this one.
    """
    meanwhile: list[int] = []
    with grpc.insecure_channel(address, LOCAL) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while not over.wait(0.02):
            before = len(ended)
            answer = stub.Check(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            meanwhile.append(len(ended) - before)
    return meanwhile


def grew_bytes(memory: list[int]) -> int:
    """What the last crowd has added."""
    return memory[-1] - memory[-2]


def test_two_thousand_calls_at_once_all_end(tiny_model: Path, tmp_path: Path) -> None:
    """Health answers the whole time; what they took is free again."""
    with sampler_process(tiny_model, tmp_path) as (pid, address):
        process = psutil.Process(pid)

        async def crowd() -> list[int]:
            ended, over = list[int](), threading.Event()
            async with grpc.aio.insecure_channel(address) as channel:
                stub = SamplerServiceStub(channel)
                await asyncio.gather(*(sampled(stub, seed, ended) for seed in range(64)))
                asking = asyncio.create_task(asyncio.to_thread(asked, address, ended, over))
                memory.append(process.memory_info().rss)
                try:
                    for crowd in range(CROWDS_MAX):
                        if crowd > 1 and grew_bytes(memory) <= GREW_BYTES_MAX:
                            break
                        every = (sampled(stub, seed, ended) for seed in range(CALLS))
                        made = await asyncio.gather(*every)
                        assert made == [NEW_TOKENS] * CALLS
                        memory.append(process.memory_info().rss)
                finally:
                    over.set()
            return await asking

        memory: list[int] = []
        meanwhile = asyncio.run(crowd())
    assert len(meanwhile) > 10
    assert np.quantile(meanwhile, 0.99) <= ENDED_MAX
    assert grew_bytes(memory) <= GREW_BYTES_MAX
