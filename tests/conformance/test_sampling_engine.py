"""What a sampling engine must do."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sampling_engines import ENGINES, HEAD_DIM, Driven, full_logprobs, opened, trained_state
from tinsmithd.domain import (
    ModelState,
    SampleRequest,
    SamplingParams,
    StopReason,
)
from tinsmithd.errors import FailedPrecondition
from tiny_models import write_tiny_model

torch.set_num_threads(1)
PROMPT = np.array([10, 20, 30, 40])


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each family."""
    path = tmp_path_factory.mktemp("sampling") / request.param
    return write_tiny_model(path, request.param, head_dim=HEAD_DIM)


@pytest.fixture(scope="module", params=ENGINES)
def name(request: pytest.FixtureRequest) -> str:
    """Each engine in turn."""
    found: str = request.param
    return found


@pytest.fixture(scope="module", autouse=True)
def _skip_what_vllm_cannot(name: str, folder: Path) -> None:
    if name == "vllm" and folder.name == "qwen3_moe":
        pytest.skip("vLLM computes experts beside adapters on GPUs alone")


@pytest.fixture(scope="module")
def engine(name: str, folder: Path, state: ModelState) -> Iterator[Driven]:
    """An engine with a trained adapter "a"."""
    engine = opened(name, folder)
    engine.load_adapter("a", state)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def state(folder: Path) -> ModelState:
    """A trained adapter."""
    return trained_state(folder)


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


def test_prompt_scores_of_the_last_positions_are_those_of_all(engine: Driven) -> None:
    """The others are empty."""
    params = SamplingParams(max_tokens=0, seed=0)
    prompt = np.arange(1, 31)
    every = engine.drain(SampleRequest(prompt, 1, params, True, 2)).scores
    last = engine.drain(SampleRequest(prompt, 1, params, True, 2, prompt_logprobs_last_n=5)).scores
    assert every is not None
    assert last is not None
    assert last.topk is not None
    assert np.isnan(last.logprobs[:-5]).all()
    assert np.isnan(last.topk.logprobs[:-5]).all()
    assert not last.topk.token_ids[:-5].any()
    np.testing.assert_allclose(last.logprobs[-5:], every.logprobs[-5:], atol=1e-5)
    np.testing.assert_array_equal(last.topk.token_ids[-5:], every.topk.token_ids[-5:])


def test_a_prompt_may_fill_the_context(engine: Driven) -> None:
    """It is scored; one that leaves room is sampled up to the last token; one token is scored."""
    context = engine.engine.info.context_length
    assert np.isfinite(engine.score(np.ones(context, np.int64))[1:]).all()
    assert np.isnan(engine.score(np.array([7]))).all()
    params = SamplingParams(max_tokens=6, seed=1, stop_at_eos=False)
    made = engine.sequences(SampleRequest(np.ones(context - 6, np.int64), 2, params))
    assert [len(sequence.tokens) for sequence in made] == [6, 6]


@pytest.mark.parametrize("top_k", [3, -1])
def test_the_likeliest_beside_a_sampled_token_are_of_its_distribution(
    engine: Driven, folder: Path, top_k: int
) -> None:
    """Temperature and top_k applied; where fewer can be drawn, cells are empty."""
    params = SamplingParams(max_tokens=8, seed=5, stop_at_eos=False, temperature=0.7, top_k=top_k)
    for found in engine.sequences(SampleRequest(PROMPT, 2, params, topk_sample_logprobs=5)):
        table = full_logprobs(folder, [*PROMPT, *found.tokens], 0.7)[len(PROMPT) - 1 : -1]
        best = np.argsort(-table, axis=1)[:, : top_k if top_k > 0 else 5]
        expected = np.take_along_axis(table, best, 1)
        if top_k > 0:
            expected -= np.logaddexp.reduce(expected, axis=1, keepdims=True)
        count = best.shape[1]
        assert found.topk is not None
        np.testing.assert_array_equal(found.topk.token_ids[:, :count], best)
        np.testing.assert_allclose(found.topk.logprobs[:, :count], expected, atol=1e-5)
        assert not found.topk.token_ids[:, count:].any()
        assert np.isnan(found.topk.logprobs[:, count:]).all()


def test_a_request_is_the_same_whatever_else_runs(engine: Driven) -> None:
    """Interleaved with others, adapters too: tokens and logprobs as alone; bit for bit where the
    engine says so."""
    wanted = [(request(4), None), (request(2, seed=6), "a"), (request(1, temperature=0), "a")]
    alone = [engine.sequences(r, adapter) for r, adapter in wanted]
    together = [made.sequences for made in engine.together(wanted)]
    if engine.engine.traits.batch_invariant:
        assert together == alone
    for pairs in zip(alone, together, strict=True):
        for before, found in zip(*pairs, strict=True):
            assert found.tokens == before.tokens
            np.testing.assert_allclose(found.logprobs, before.logprobs, atol=1e-5)


def test_prompts_are_scored_with_their_own_adapter_beside_others(engine: Driven) -> None:
    """Scoring and sampling, base and adapters, in one batch: as alone."""
    prompt = np.arange(1, 40)
    scoring = SampleRequest(prompt, 1, SamplingParams(max_tokens=0, seed=0), True)
    wanted = [(scoring, "a"), (request(3), "a"), (scoring, None), (request(2), None)]
    alone = [engine.score(prompt, "a"), engine.score(prompt)]
    assert np.abs(alone[0][1:] - alone[1][1:]).max() > 1e-2
    made = engine.together([*wanted, *wanted])
    for index, expected in ((0, 0), (2, 1), (4, 0), (6, 1)):
        scores = made[index].scores
        assert scores is not None
        np.testing.assert_allclose(scores.logprobs, alone[expected], atol=1e-5)


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


def test_an_adapter_changes_the_samples_and_can_be_unloaded(
    engine: Driven, state: ModelState
) -> None:
    """The base model is untouched by adapters that come and go."""
    base = engine.sequences(request())
    engine.load_adapter("b", state)
    tuned = [engine.sequences(request(), key) for key in ("a", "b")]
    assert tuned[0] == tuned[1] != base
    engine.unload_adapter("b")
    engine.unload_adapter("b")
    with pytest.raises(KeyError):
        engine.sequences(request(), "b")
    assert engine.sequences(request()) == base
    assert engine.sequences(request(), "a") == tuned[0]


def test_an_adapter_that_does_not_fit_is_refused(engine: Driven, state: ModelState) -> None:
    """Nothing of it stays."""
    weights = dict(state.weights)
    weights.pop(sorted(weights)[0])
    bad = ModelState(state.tuning, weights, {}, 0, state.config)
    with pytest.raises(FailedPrecondition):
        engine.load_adapter("bad", bad)
    with pytest.raises(KeyError):
        engine.sequences(request(), "bad")
    engine.sequences(request(), "a")
