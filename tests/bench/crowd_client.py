"""Makes thousands of calls at once. See `remote`."""

import asyncio
import os
import time
from collections.abc import Sequence

import grpc

from sampler_server import sample_request
from tinsmith.tensors import decode
from tinsmith.v1.sampler_service_pb2_grpc import SamplerServiceStub

NEW_TOKENS = 8
Metadata = Sequence[tuple[str, str]]


class CrowdClient:
    """Callers of one Sampler. They give way to whoever wants the processor: elsewhere they would
    have one of their own.

    Args:
        address: Of the Sampler.
    """

    def __init__(self, address: str) -> None:
        os.nice(19)
        self._address = address

    def run(self, calls: int, metadata: Metadata) -> float:
        """Make calls at once and wait for all; returns how long it took, seconds."""
        return asyncio.run(self._run(calls, metadata))

    async def _run(self, calls: int, metadata: Metadata) -> float:
        async with grpc.aio.insecure_channel(self._address) as channel:
            stub = SamplerServiceStub(channel)
            await asyncio.gather(*(_sampled(stub, seed, metadata) for seed in range(8)))
            start_s = time.perf_counter()
            made = await asyncio.gather(*(_sampled(stub, seed, metadata) for seed in range(calls)))
            assert made == [NEW_TOKENS] * calls
            return time.perf_counter() - start_s


async def _sampled(stub: SamplerServiceStub, seed: int, metadata: Metadata) -> int:
    """The tokens that a call gave."""
    request = sample_request(params={"seed": seed, "max_tokens": NEW_TOKENS})
    call = stub.Sample(request, metadata=metadata)
    return sum([len(decode(d.tokens)) async for response in call for d in response.deltas])
