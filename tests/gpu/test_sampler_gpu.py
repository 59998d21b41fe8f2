"""The embedded Sampler on a GPU, beside the trainer there."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data import collect, make_data
from engines import make_engine
from sampling_engines import Driven, embedded
from tinsmithd.domain import (
    AdamParams,
    Datum,
    LoraConfig,
    ModelState,
    SampleRequest,
    SamplingParams,
)
from tinsmithd.modeling.base import load_base
from tiny_models import write_tiny_model

FAMILIES = ("llama", "qwen3_moe")
CLOSE = {"float32": 1e-3, "bfloat16": 0.1}


def trained(folder: Path, dtype: str, data: list[Datum]) -> tuple[ModelState, list[np.ndarray]]:
    """An adapter that was trained a little, and the trainer's logprobs with it."""
    engine = make_engine("deepspeed", str(folder), dtype=dtype)
    engine.create_model("m", LoraConfig(rank=4, seed=7))
    for seed in range(3):
        collect(engine, "m", make_data(seed, 3), backward=True)
        engine.optim_step("m", AdamParams(learning_rate=1e-2))
    _, logprobs = collect(engine, "m", data, backward=False)
    return engine.export_state("m", optimizer=False), logprobs


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Tiny models."""
    return write_tiny_model(tmp_path / "model", request.param, hidden_size=256, head_dim=64)


@pytest.fixture
def sampler(folder: Path) -> Iterator[Driven]:
    """The engine, in bfloat16."""
    driven = embedded(load_base(str(folder), dtype="bfloat16", on_progress=lambda _: None))
    yield driven
    driven.close()


@pytest.mark.parametrize("dtype", CLOSE)
def test_it_scores_as_the_trainer_does(folder: Path, dtype: str) -> None:
    """A prompt's logprobs under a trained adapter."""
    data = make_data(9, 3)
    state, expected = trained(folder, dtype, data)
    driven = embedded(load_base(str(folder), dtype=dtype, on_progress=lambda _: None))
    driven.load_adapter("a", state)
    for datum, logprobs in zip(data, expected, strict=True):
        targets = datum.loss_fn_inputs["target_tokens"]
        for place, target in enumerate(targets):
            prompt = np.array([*datum.tokens[: place + 1], target])
            found = driven.score(prompt, "a")[-1]
            assert found == pytest.approx(logprobs[place], abs=CLOSE[dtype])
    driven.close()


def test_seeds_and_neighbours(sampler: Driven) -> None:
    """A seed gives the same tokens again, alone and beside others of other lengths."""
    prompts = [np.arange(3, 3 + length) for length in (2, 17, 40)]
    requests = [
        SampleRequest(prompt, 2, SamplingParams(max_tokens=12, seed=seed), False, 0)
        for seed, prompt in enumerate(prompts)
    ]
    alone = [[s.tokens for s in sampler.sequences(request)] for request in requests]
    together = sampler.together([(request, None) for request in requests])
    assert [[s.tokens for s in each.sequences] for each in together] == alone


def test_greedy_tokens_are_the_likeliest(sampler: Driven) -> None:
    """Their logprobs are those that the same tokens have as a prompt."""
    prompt = np.arange(5, 15)
    params = SamplingParams(max_tokens=8, temperature=0.0, seed=0)
    (made,) = sampler.sequences(SampleRequest(prompt, 1, params, False, 0))
    scored = sampler.score(np.array([*prompt, *made.tokens]))[len(prompt) :]
    assert all(np.isfinite(scored))
    assert len(made.tokens) <= 8
