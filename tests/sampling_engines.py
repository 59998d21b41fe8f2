"""Sampling engines for tests that are not asynchronous: an event loop on a thread drives them."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from data import make_data
from tinsmithd.domain import (
    AdamParams,
    CrossEntropy,
    LoraConfig,
    ModelState,
    Output,
    PromptScores,
    SampledTokens,
    SampleRequest,
    SamplingParams,
    TopKLogprobs,
)
from tinsmithd.modeling.base import BaseModel, load_base
from tinsmithd.sampler.engines.interface import SamplingEngine
from tinsmithd.sampler.engines.transformers.engine import EngineLimits, TransformersEngine
from tinsmithd.sampler.engines.vllm import opening as vllm
from tinsmithd.trainer.engines.interface import Batch
from tinsmithd.trainer.engines.reference import ReferenceEngine

Value = TypeVar("Value")


@dataclass
class Drained:
    """All that a request gave.

    Attributes:
        scores: Of its prompt; None where it asked for none.
        sequences: Its sequences by index, each whole.
        cached: Tokens of its prompt that came from a cache.
    """

    scores: PromptScores | None = None
    sequences: list[SampledTokens] = field(default_factory=list)
    cached: int = 0


class Driven:
    """An engine, and the loop that its methods run on."""

    def __init__(self, engine: SamplingEngine) -> None:
        self.engine = engine
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the engine, then the loop."""
        self.run(self.engine.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, coroutine: Coroutine[Any, Any, Value]) -> Value:
        """Wait for a coroutine."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(120)

    def load_adapter(self, key: str, state: ModelState) -> None:
        """See `SamplingEngine.load_adapter`."""
        self.run(self.engine.load_adapter(key, state))

    def unload_adapter(self, key: str) -> None:
        """See `SamplingEngine.unload_adapter`."""
        self.run(self.engine.unload_adapter(key))

    def drain(self, request: SampleRequest, adapter: str | None = None) -> Drained:
        """Wait for all that a request gives."""
        return self.run(drained(self.engine, request, adapter))

    def sequences(self, request: SampleRequest, adapter: str | None = None) -> list[SampledTokens]:
        """Wait for the sequences of a request."""
        return self.drain(request, adapter).sequences

    def together(self, wanted: Sequence[tuple[SampleRequest, str | None]]) -> list[Drained]:
        """Wait for requests that are under way at the same time."""

        async def all_of_them() -> list[Drained]:
            return await asyncio.gather(*(drained(self.engine, *each) for each in wanted))

        return self.run(all_of_them())

    def score(self, prompt: np.ndarray, adapter: str | None = None, *, topk: int = 0) -> np.ndarray:
        """The logprobs of a prompt, `(P,)`."""
        params = SamplingParams(max_tokens=0, seed=0)
        scores = self.drain(SampleRequest(prompt, 1, params, True, topk), adapter).scores
        assert scores is not None
        assert scores.logprobs is not None
        return scores.logprobs


async def outputs_of(
    engine: SamplingEngine, request: SampleRequest, adapter: str | None = None
) -> AsyncGenerator[Output, None]:
    """What a request makes, as it comes; to close it gives the request up."""
    made: asyncio.Queue[Output | None] = asyncio.Queue()
    making = asyncio.create_task(engine.generate(request, adapter, made.put_nowait))
    making.add_done_callback(lambda _: made.put_nowait(None))
    try:
        while (output := await made.get()) is not None:
            yield output
        await making
    finally:
        making.cancel()
        await asyncio.wait([making])


async def drained(engine: SamplingEngine, request: SampleRequest, adapter: str | None) -> Drained:
    """All that a request gives; each output is checked against the interface."""
    found = Drained()
    parts: dict[int, list[SampledTokens]] = {}
    async with aclosing(outputs_of(engine, request, adapter)) as outputs:
        async for output in outputs:
            if output.prompt_scores is not None:
                assert found.scores is None
                assert not parts, "scores come first"
                found.scores = output.prompt_scores
            found.cached += output.prompt_cache_hit_tokens
            for part in output.tokens:
                before = parts.setdefault(part.sequence_index, [])
                assert all(each.stop_reason is None for each in before)
                before.append(part)
    found.sequences = [_joined(parts[index]) for index in sorted(parts)]
    assert all(sequence.stop_reason is not None for sequence in found.sequences)
    return found


def _joined(parts: list[SampledTokens]) -> SampledTokens:
    topk = None
    if parts[0].topk is not None:
        topks = [part.topk for part in parts if part.topk is not None]
        topk = TopKLogprobs(
            np.concatenate([each.token_ids for each in topks]),
            np.concatenate([each.logprobs for each in topks]),
        )
    return SampledTokens(
        parts[0].sequence_index,
        [token for part in parts for token in part.tokens],
        [logprob for part in parts for logprob in part.logprobs],
        parts[-1].stop_reason,
        topk,
    )


def embedded(base: BaseModel, limits: EngineLimits | None = None) -> Driven:
    """The embedded engine, driven."""
    return Driven(TransformersEngine(base, limits))


def trained_state(folder: Path) -> ModelState:
    """An adapter that was trained a little."""
    trainer = ReferenceEngine(load_base(str(folder), dtype="float32", on_progress=lambda _: None))
    trainer.create_model("m", LoraConfig(rank=4, seed=3))
    for seed in range(3):
        data = make_data(seed, 2)
        trainer.forward(Batch("m", data, CrossEntropy(), backward=True), lambda *_: None)
        trainer.optim_step("m", AdamParams(learning_rate=3e-2))
    return trainer.export_state("m", optimizer=False)


def full_logprobs(folder: Path, tokens: Sequence[int], temperature: float = 1.0) -> np.ndarray:
    """Log-softmax after each position, by one plain forward of the base model in float64."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    )
    with torch.no_grad():
        logits = model(torch.tensor([list(tokens)])).logits[0]
    return (logits / temperature).log_softmax(-1).numpy()


VLLM_START_S_MAX = 400
"""On a busy machine; with a test, since what waits for it is a fixture."""
TORCH_ALONE = "transformers, torch alone"
"""The embedded engine without compiled kernels."""
ENGINES = (
    "transformers",
    TORCH_ALONE,
    pytest.param(
        "vllm",
        marks=[
            pytest.mark.skipif(
                not vllm.is_installed(), reason="vLLM is not installed here; make test-vllm"
            ),
            pytest.mark.timeout(VLLM_START_S_MAX),
        ],
    ),
)
"""Parameters of a fixture that opens each engine in turn."""
HEAD_DIM = 32
"""The smallest that vLLM computes on a CPU."""
VLLM_SETTINGS = vllm.VllmSettings(dtype="float32", kv_cache_bytes_max=1 << 26)


def opened(name: str, folder: Path) -> Driven:
    """An engine by name, driven, on a model whose heads have `HEAD_DIM`; float32."""
    if name == "vllm":
        return Driven(vllm.open_engine(str(folder), VLLM_SETTINGS))
    base = load_base(str(folder), dtype="float32", on_progress=lambda _: None)
    return embedded(base, EngineLimits(native="never" if name == TORCH_ALONE else "always"))
