"""The Sampler's engine without its server: the other side of what the wire costs. See `remote`."""

import asyncio
import gc
import time
from collections.abc import Sequence

import numpy as np

from bench.sampling_workloads import Call
from tinsmithd.config import SamplerConfig
from tinsmithd.domain import Output, SampleRequest, SamplingParams
from tinsmithd.sampler.engines.interface import SamplingEngine
from tinsmithd.sampler.server import load_engine


class EngineAlone:
    """An engine as a Sampler with default settings has it, on one event loop.

    Args:
        folder: The model.
        dtype: Of the base model.
        threads: Of torch.
    """

    def __init__(self, folder: str, dtype: str, threads: int) -> None:
        config = SamplerConfig(base_model=folder, dtype=dtype, threads=threads)
        self._engine: SamplingEngine = load_engine(config)
        gc.freeze()  # as the server does
        self._loop = asyncio.Runner()

    def run(self, calls: Sequence[Call]) -> float:
        """Make calls at once and wait for all; returns the seconds to the first token."""
        start_s = time.perf_counter()

        async def all_of_them() -> list[float]:
            return await asyncio.gather(*map(self._run, calls))

        return min(self._loop.run(all_of_them())) - start_s

    async def _run(self, call: Call) -> float:
        """One call; returns when its first token came."""
        params = SamplingParams(call.new_tokens, seed=call.seed, stop_at_eos=False)
        request = SampleRequest(np.array(call.prompt), call.num_samples, params)
        first_s, made = 0.0, 0

        def take(output: Output) -> None:
            nonlocal first_s, made
            first_s = first_s or time.perf_counter()
            made += sum(len(tokens.tokens) for tokens in output.tokens)

        await self._engine.generate(request, None, take)
        assert made == call.num_samples * call.new_tokens
        return first_s
