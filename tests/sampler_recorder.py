"""An engine that writes down what it is asked, and calls to admission over it."""

import asyncio
from collections import Counter
from contextlib import aclosing

import numpy as np

from tinsmithd.domain import (
    DEFAULT_OWNER,
    BaseModelInfo,
    LoraConfig,
    ModelState,
    Output,
    SampledTokens,
    SampleRequest,
    SamplingParams,
    StopReason,
)
from tinsmithd.errors import FailedPrecondition, Reason
from tinsmithd.sampler.admission import Admission
from tinsmithd.sampler.engines.interface import EngineStats, EngineTraits, OnOutput
from tinsmithd.sampler.loaded_adapters import Adapter, Fetched
from tinsmithd.sampler.places import PlaceLimits

ADAPTER_BYTES = 4000
STATE = ModelState(LoraConfig(), {"w": np.zeros(ADAPTER_BYTES // 4, np.float32)}, {}, 0, {})


class Recorder:
    """An engine that writes down what it is asked; a request's name is its seed."""

    info = BaseModelInfo("tiny", "x", 8, 64, "float32", 1, 1)
    traits = EngineTraits("recorder", batch_invariant=True)

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.started: list[int] = []
        self.closed: list[int] = []
        self.loads: list[str] = []
        self.unloads: list[str] = []
        self.held: set[str] = set()
        self.misfits: set[str] = set()
        self.used: Counter[str] = Counter()
        self.may_step = asyncio.Event()
        self.may_step.set()
        self.may_load = asyncio.Event()
        self.may_load.set()

    async def tokenizer_files(self) -> dict[str, bytes]:
        return {"a": b"b"}

    async def load_adapter(self, key: str, state: ModelState) -> None:
        self.loads.append(key)
        await self.may_load.wait()
        if key in self.misfits:
            raise FailedPrecondition("it does not fit", Reason.INCOMPATIBLE_CHECKPOINT)
        self.held.add(key)

    async def unload_adapter(self, key: str) -> None:
        assert not self.used[key], "it is in use"
        self.unloads.append(key)
        await asyncio.sleep(0)
        self.held.discard(key)

    async def generate(
        self, request: SampleRequest, adapter: str | None, on_output: OnOutput
    ) -> None:
        """One token per step until `max_tokens`."""
        name = request.params.seed
        assert name is not None
        self.started.append(name)
        if adapter is not None:
            self.used[adapter] += 1
        try:
            for left in reversed(range(request.params.max_tokens)):
                await self.may_step.wait()
                await asyncio.sleep(0)
                assert adapter is None or adapter in self.held
                self.steps.append(name)
                reason = None if left else StopReason.LENGTH
                on_output(Output(tokens=[SampledTokens(0, [1], [0.0], reason)]))
        finally:
            if adapter is not None:
                self.used[adapter] -= 1
            self.closed.append(name)

    def stats(self) -> EngineStats:
        return EngineStats()

    async def failed(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        self.may_step.set()


def new_admission(
    engine: Recorder,
    running: int,
    waiting: int,
    adapters: int,
    *,
    fetches_max: int = 16,
    rows: int = 1000,
    tokens_max: int = 0,
    counted: bool = False,
) -> Admission:
    return Admission(
        engine,
        PlaceLimits(running, waiting, rows, tokens_max),
        adapters_max=adapters if counted else 1000,
        adapters_bytes_max=1 << 40 if counted else adapters * ADAPTER_BYTES,
        fetches_max=fetches_max,
    )


def request(name: int, max_tokens: int, samples: int = 1) -> SampleRequest:
    return SampleRequest(np.array([1]), samples, SamplingParams(max_tokens, seed=name))


async def drain(
    admission: Admission,
    name: int,
    max_tokens: int,
    adapter: Adapter | None = None,
    *,
    owner: str = DEFAULT_OWNER,
    samples: int = 1,
) -> int:
    """Number of tokens that arrived."""
    asked = request(name, max_tokens, samples)
    async with aclosing(admission.run(asked, adapter, owner)) as outputs:  # type: ignore[type-var]
        return sum([len(made.tokens) async for output in outputs for made in output.tokens])


def adapter(
    key: str, fetched: list[str] | None = None, gate: asyncio.Event | None = None
) -> Adapter:
    async def fetch() -> Fetched:
        if fetched is not None:
            fetched.append(key)
        if gate is not None:
            await gate.wait()
        return Fetched(STATE)

    return Adapter(key, fetch)
