"""What a sampling engine gives beside tokens."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sampling_engines import Drained, Driven, embedded, full_logprobs, trained_state
from tinsmithd.domain import PromptScores, SampleRequest, SamplingParams
from tinsmithd.modeling.base import load_base
from tiny_models import write_tiny_model

torch.set_num_threads(1)
VOCAB = 320
PROMPT = np.array([10, 20, 30, 40, 50, 60])
LONG = np.random.default_rng(3).integers(0, VOCAB, 480)
"""More than one piece, so that a scored position may be the first of one."""


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each family."""
    return write_tiny_model(tmp_path_factory.mktemp("scores") / request.param, request.param)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Driven]:
    """An engine with a trained adapter "a"."""
    engine = embedded(load_base(str(folder), dtype="float32", on_progress=lambda _: None))
    engine.load_adapter("a", trained_state(folder))
    yield engine
    engine.close()


def asking(prompt: np.ndarray = PROMPT, temperature: float = 1.0, **asked: Any) -> SampleRequest:
    """One token more, and what is asked."""
    params = SamplingParams(max_tokens=1, temperature=temperature, seed=5, stop_at_eos=False)
    return SampleRequest(prompt, 1, params, **asked)


def everything(prompt: np.ndarray) -> SampleRequest:
    """All that can be asked at once."""
    targets = np.random.default_rng(4).integers(-1, VOCAB, (len(prompt) - 1, 3))
    return asking(
        prompt,
        temperature=0.7,
        include_prompt_logprobs=True,
        topk_prompt_logprobs=4,
        target_prompt_logprobs=targets,
        prompt_alt_tokens_k=5,
        topk_sample_logprobs=4,
    )


def scores_of(made: Drained) -> PromptScores:
    assert made.scores is not None
    return made.scores


def arrays(made: Drained) -> list[np.ndarray]:
    """Every number that a request gave."""
    scores, (sequence,) = scores_of(made), made.sequences
    tables = [scores.topk, scores.alt_tokens, sequence.topk]
    found = [scores.logprobs, scores.targets, np.array(sequence.logprobs)]
    for table in tables:
        assert table is not None
        found += [table.token_ids, table.logprobs]
    assert all(array is not None for array in found)
    return [np.asarray(array) for array in found]


@pytest.mark.parametrize("prompt", [PROMPT, LONG])
def test_all_of_it_is_what_a_plain_forward_gives(
    engine: Driven, folder: Path, prompt: np.ndarray
) -> None:
    """To 1e-5 of float64; what is drawn at the request's temperature, all else at 1."""
    request = everything(prompt)
    made = engine.drain(request)
    scores, (sequence,) = scores_of(made), made.sequences
    at_1, drawn_from = (full_logprobs(folder, prompt, each) for each in (1.0, 0.7))
    targets = request.target_prompt_logprobs
    assert targets is not None
    wanted = np.where(targets < 0, 0.0, np.take_along_axis(at_1[:-1], targets.clip(0), 1))
    np.testing.assert_allclose(scores.targets, wanted, atol=1e-5)
    assert scores.logprobs is not None
    own = np.take_along_axis(at_1[:-1], prompt[1:, None], 1)[:, 0]
    np.testing.assert_allclose(scores.logprobs[1:], own, atol=1e-5)
    assert scores.alt_tokens is not None
    ids = scores.alt_tokens.token_ids
    np.testing.assert_allclose(
        scores.alt_tokens.logprobs, np.take_along_axis(drawn_from[:-1], ids, 1), atol=1e-5
    )
    assert sequence.topk is not None
    np.testing.assert_allclose(sequence.topk.logprobs[0], -np.sort(-drawn_from[-1])[:4], atol=1e-5)


def test_nothing_depends_on_neighbours_or_on_the_cache(engine: Driven) -> None:
    """Bit for bit: alone, beside many with and without an adapter, and again."""
    wanted = [(everything(PROMPT), None), (everything(LONG), "a"), (everything(LONG[3:]), None)]
    alone = [arrays(engine.drain(*each)) for each in wanted]
    others = [(everything(LONG[n:]), "a" if n % 2 else None) for n in range(10, 20)]
    together = engine.together([*others[:5], *wanted, *others[5:]])[5:8]
    for one, other in zip(alone, map(arrays, together), strict=True):
        for first, second in zip(one, other, strict=True):
            np.testing.assert_array_equal(first, second)


def test_targets_that_are_the_prompt_have_its_logprobs(engine: Driven) -> None:
    """Bit for bit, with an adapter and without; the two differ."""
    found = []
    for adapter in (None, "a"):
        request = asking(LONG, include_prompt_logprobs=True, target_prompt_logprobs=LONG[1:, None])
        scores = scores_of(engine.drain(request, adapter))
        assert scores.logprobs is not None
        assert scores.targets is not None
        np.testing.assert_array_equal(scores.targets[:, 0], scores.logprobs[1:])
        found.append(scores.logprobs[1:])
    assert np.abs(found[0] - found[1]).max() > 1e-3


@pytest.mark.parametrize("last_n", [1, 2, 224, 225, len(LONG) - 1])
def test_the_last_n_are_those_of_the_whole(engine: Driven, last_n: int) -> None:
    """Bit for bit, also where the first of them is the first of a piece, and from the cache."""
    asked = {"include_prompt_logprobs": True, "topk_prompt_logprobs": 2}
    whole = scores_of(engine.drain(asking(LONG, **asked))).logprobs
    made = engine.drain(asking(LONG, **asked, prompt_logprobs_last_n=last_n))
    part = scores_of(made).logprobs
    assert whole is not None
    assert part is not None
    np.testing.assert_array_equal(part[-last_n:], whole[-last_n:])
    assert np.isnan(part[:-last_n]).all()
    assert made.cached <= len(LONG) - 1 - last_n, "these positions had to be computed"


def test_topk_may_be_the_whole_vocabulary(engine: Driven) -> None:
    """Its probabilities are 1 together, at any temperature."""
    request = asking(temperature=1.3, topk_sample_logprobs=VOCAB, topk_prompt_logprobs=VOCAB)
    made = engine.drain(request)
    assert made.sequences[0].topk is not None
    scores = scores_of(made)
    assert scores.topk is not None
    for ids, logprobs in (
        (made.sequences[0].topk.token_ids[0], made.sequences[0].topk.logprobs[0]),
        (scores.topk.token_ids[-1], scores.topk.logprobs[-1]),
    ):
        assert sorted(ids) == list(range(VOCAB))
        assert np.exp(logprobs.astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)


def test_alternatives_do_not_take_the_samples_numbers(engine: Driven) -> None:
    """What is sampled is the same with them and without; the seed decides what is drawn."""
    plain = asking()
    first = engine.drain(replace(plain, prompt_alt_tokens_k=6))
    assert first.sequences[0].tokens == engine.sequences(plain)[0].tokens
    other = replace(plain, params=replace(plain.params, seed=6), prompt_alt_tokens_k=6)
    one, two = (scores_of(each).alt_tokens for each in (first, engine.drain(other)))
    assert one is not None
    assert two is not None
    assert (one.token_ids != two.token_ids).any()
