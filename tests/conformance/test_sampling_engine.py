"""What a sampling engine must do."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sampling_engines import Driven, embedded, full_logprobs, trained_state
from tinsmithd.domain import (
    ModelState,
    SampleRequest,
    SamplingParams,
    StopReason,
)
from tinsmithd.errors import FailedPrecondition
from tinsmithd.modeling.base import load_base
from tiny_models import write_tiny_model

torch.set_num_threads(1)
PROMPT = np.array([10, 20, 30, 40])


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each family."""
    return write_tiny_model(tmp_path_factory.mktemp("sampling") / request.param, request.param)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Driven]:
    """An engine with a trained adapter "a"."""
    engine = embedded(load_base(str(folder), dtype="float32", on_progress=lambda _: None))
    engine.load_adapter("a", trained_state(folder))
    yield engine
    engine.close()


def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def request(num_samples: int = 1, **kwargs: object) -> SampleRequest:
    params = {"max_tokens": 12, "seed": 5, "stop_at_eos": False, **kwargs}
    return SampleRequest(PROMPT, num_samples, SamplingParams(**params))  # type: ignore[arg-type]


def test_greedy_is_what_generate_makes(engine: Driven, folder: Path) -> None:
    """Temperature 0 equals transformers' own greedy generation."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = torch.tensor([PROMPT.tolist()])
    expected = model.generate(
        prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, use_cache=True
    )[0, len(PROMPT) :]
    (found,) = engine.sequences(request(temperature=0))
    assert list(found.tokens) == expected.tolist()


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_sampled_logprobs_are_those_of_a_full_forward(
    engine: Driven, folder: Path, temperature: float
) -> None:
    """The cache changes nothing: 1e-5."""
    for found in engine.sequences(request(3, temperature=temperature)):
        table = full_logprobs(folder, [*PROMPT, *found.tokens], temperature)
        rows = table[len(PROMPT) - 1 : -1]
        expected = [row[token] for row, token in zip(rows, found.tokens, strict=True)]
        np.testing.assert_allclose(found.logprobs, expected, atol=1e-5)


def test_prompt_scores_are_those_of_a_full_forward(engine: Driven, folder: Path) -> None:
    """Logprobs and top-k, NaN at position 0; scoring alone makes no token."""
    params = SamplingParams(max_tokens=0, seed=0)
    made = engine.drain(SampleRequest(PROMPT, 1, params, True, 3))
    assert not made.sequences
    scores = made.scores
    assert scores is not None
    assert scores.topk is not None
    table = full_logprobs(folder, PROMPT)
    expected = [table[i, token] for i, token in enumerate(PROMPT[1:])]
    assert np.isnan(scores.logprobs[0])
    np.testing.assert_allclose(scores.logprobs[1:], expected, atol=1e-5)
    best = np.argsort(-table, axis=1)[:-1, :3]
    np.testing.assert_array_equal(scores.topk.token_ids[1:], best)
    np.testing.assert_allclose(
        scores.topk.logprobs[1:], np.take_along_axis(table[:-1], best, 1), atol=1e-5
    )


def test_a_request_is_the_same_whatever_else_runs(engine: Driven) -> None:
    """Interleaved with others, adapters too: tokens and logprobs bit for bit as alone."""
    wanted = [(request(4), None), (request(2, seed=6), "a"), (request(1, temperature=0), "a")]
    alone = [engine.sequences(r, adapter) for r, adapter in wanted]
    together = [made.sequences for made in engine.together(wanted)]
    assert together == alone


def test_sequences_of_a_request_end_on_their_own(engine: Driven) -> None:
    """Those that go on are not disturbed by those that stop."""
    long = engine.sequences(request(4))
    stop = long[0].tokens[3]
    for before, found in zip(long, engine.sequences(request(4, stop_tokens=(stop,))), strict=True):
        count = len(found.tokens)
        assert found.tokens == before.tokens[:count]
        np.testing.assert_allclose(found.logprobs, before.logprobs[:count], atol=1e-5)
        stopped = stop in before.tokens
        assert found.stop_reason is (StopReason.STOP if stopped else StopReason.LENGTH)
        assert count == (before.tokens.index(stop) + 1 if stopped else 12)


def test_stop_strings_end_a_sequence(engine: Driven, folder: Path) -> None:
    """The text that completes the stop is in the returned tokens."""
    (free,) = engine.sequences(request())
    text = tokenizer(folder).decode(list(free.tokens[:5]))
    (found,) = engine.sequences(request(stop_strings=(text[-2:],)))
    assert found.stop_reason is StopReason.STOP
    assert found.tokens == free.tokens[: len(found.tokens)]
    assert len(found.tokens) <= 5


def test_an_adapter_changes_the_samples_and_can_be_unloaded(engine: Driven, folder: Path) -> None:
    """The base model is untouched by adapters that come and go."""
    base = engine.sequences(request())
    engine.load_adapter("b", trained_state(folder))
    tuned = [engine.sequences(request(), key) for key in ("a", "b")]
    assert tuned[0] == tuned[1] != base
    engine.unload_adapter("b")
    engine.unload_adapter("b")
    with pytest.raises(KeyError):
        engine.sequences(request(), "b")
    assert engine.sequences(request()) == base
    assert engine.sequences(request(), "a") == tuned[0]


def test_an_adapter_that_does_not_fit_is_refused(engine: Driven, folder: Path) -> None:
    """Nothing of it stays."""
    state = trained_state(folder)
    weights = dict(state.weights)
    weights.pop(sorted(weights)[0])
    bad = ModelState(state.tuning, weights, {}, 0, state.config)
    with pytest.raises(FailedPrecondition):
        engine.load_adapter("bad", bad)
    with pytest.raises(KeyError):
        engine.sequences(request(), "bad")
    engine.sequences(request(), "a")
