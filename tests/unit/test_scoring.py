"""What a prompt is scored with, against float64 arithmetic over the same logits."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tinsmithd.domain import PromptScores, SampleRequest, SamplingParams
from tinsmithd.sampler.engines.transformers.sampling import Workspace
from tinsmithd.sampler.engines.transformers.scoring import (
    PromptScorer,
    ScoredRows,
    chunks_of,
    rows_index,
)
from tinsmithd.sampler.engines.transformers.scoring import score as score_chunk

COUNT, VOCAB = 9, 300
PROMPT = np.arange(10, 10 + COUNT)
TARGETS = np.random.default_rng(2).integers(0, VOCAB, (COUNT - 1, 4))
TARGETS[::3, 1] = TARGETS[2] = -1


def logits(count: int = COUNT) -> torch.Tensor:
    return 3 * torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(1))


def expected(temperature: float = 1.0) -> np.ndarray:
    """Row i: logprobs at position i + 1."""
    return (logits()[:-1].double() / temperature).log_softmax(1).numpy()


def score(cuts: Sequence[int] = (), temperature: float = 1.0, **asked: object) -> PromptScores:
    """Score the prompt, its rows cut into pieces, each beside a row of somebody else."""
    params = SamplingParams(max_tokens=1, temperature=temperature, seed=7)
    request = SampleRequest(PROMPT, 1, params, **asked)  # type: ignore[arg-type]
    other = PromptScorer(SampleRequest(PROMPT, 1, params, include_prompt_logprobs=True))
    scorer, start = PromptScorer(request), request.logits_from
    for end in [*(cut for cut in cuts if cut > start), COUNT - 1]:
        rows = [
            ScoredRows(other, 0, np.array([0])),
            ScoredRows(scorer, start, np.arange(start, end)),
        ]
        for chunk in chunks_of(rows if cuts else rows[1:]):
            score_chunk(logits()[rows_index(chunk)], chunk, Workspace())
        start = end
    return scorer.scores()


def test_logprobs_topk_and_targets_are_those_of_float64() -> None:
    """To 1e-6; nothing at position 0, and 0 where a target is -1."""
    scores = score(
        include_prompt_logprobs=True, topk_prompt_logprobs=5, target_prompt_logprobs=TARGETS
    )
    table = expected()
    assert scores.logprobs is not None
    assert np.isnan(scores.logprobs[0])
    rows = np.arange(COUNT - 1)
    np.testing.assert_allclose(scores.logprobs[1:], table[rows, PROMPT[1:]], atol=1e-6)
    assert scores.topk is not None
    best = np.argsort(-table, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(scores.topk.token_ids[1:], best)
    np.testing.assert_allclose(
        scores.topk.logprobs[1:], np.take_along_axis(table, best, 1), atol=1e-6
    )
    assert np.isnan(scores.topk.logprobs[0]).all()
    wanted = np.where(TARGETS < 0, 0.0, np.take_along_axis(table, TARGETS.clip(0), 1))
    assert scores.targets is not None
    np.testing.assert_allclose(scores.targets, wanted, atol=1e-6)


@pytest.mark.parametrize("last_n", [1, 4, COUNT - 1])
def test_last_n_leaves_the_other_positions_empty(last_n: int) -> None:
    """The last n are those of a call without it, bit for bit; targets know no last n."""
    asked = {"include_prompt_logprobs": True, "topk_prompt_logprobs": 2}
    whole = score(**asked)
    for others in ({}, {"target_prompt_logprobs": TARGETS}):
        part = score(**asked, **others, prompt_logprobs_last_n=last_n)
        assert part.logprobs is not None
        assert whole.logprobs is not None
        assert np.isnan(part.logprobs[:-last_n]).all()
        np.testing.assert_array_equal(part.logprobs[-last_n:], whole.logprobs[-last_n:])
        assert part.topk is not None
        assert whole.topk is not None
        assert np.isnan(part.topk.logprobs[:-last_n]).all()
        assert not part.topk.token_ids[:-last_n].any()
        np.testing.assert_array_equal(part.topk.token_ids[-last_n:], whole.topk.token_ids[-last_n:])
        if others:
            np.testing.assert_array_equal(
                part.targets, score(target_prompt_logprobs=TARGETS).targets
            )


def test_a_prompt_of_one_token_has_nothing_to_score() -> None:
    """Whatever is asked."""
    params = SamplingParams(max_tokens=1, seed=7)
    targets = np.zeros((0, 3), np.int64)
    asked = SampleRequest(PROMPT[:1], 1, params, True, 2, None, targets, prompt_alt_tokens_k=4)
    scores = PromptScorer(asked).scores()
    assert scores.logprobs is not None
    assert np.isnan(scores.logprobs).tolist() == [True]
    assert scores.topk is not None
    assert np.isnan(scores.topk.logprobs).tolist() == [[True, True]]
    assert scores.targets is not None
    assert scores.targets.shape == (0, 3)
    assert scores.alt_tokens is not None
    assert scores.alt_tokens.token_ids.shape == (0, 4)


@pytest.mark.parametrize("cuts", [(1, 2, 3), (5,), (7,)])
def test_pieces_change_no_bit(cuts: Sequence[int]) -> None:
    """Whatever the pieces are in which the rows come."""
    asked = {
        "include_prompt_logprobs": True,
        "topk_prompt_logprobs": 3,
        "target_prompt_logprobs": TARGETS,
        "prompt_alt_tokens_k": 6,
    }
    whole, cut = score(**asked), score(cuts, **asked)
    for one, other in (
        (whole.logprobs, cut.logprobs),
        (whole.targets, cut.targets),
        (whole.topk, cut.topk),
        (whole.alt_tokens, cut.alt_tokens),
    ):
        assert one is not None
        assert other is not None
        arrays = ([each] if isinstance(each, np.ndarray) else vars(each).values()
                  for each in (one, other))  # fmt: skip
        for first, second in zip(*arrays, strict=True):
            np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_alternatives_come_from_the_distribution(temperature: float) -> None:
    """More of them than there are tokens; frequencies within 5 sigma, logprobs to 1e-6."""
    k = 4000
    drawn = score(temperature=temperature, prompt_alt_tokens_k=k).alt_tokens
    assert drawn is not None
    table = expected(temperature)
    assert drawn.token_ids.shape == (COUNT - 1, k)
    np.testing.assert_allclose(
        drawn.logprobs, np.take_along_axis(table, drawn.token_ids, 1), atol=1e-6
    )
    for row in range(COUNT - 1):
        found = np.bincount(drawn.token_ids[row], minlength=VOCAB)
        wanted = k * np.exp(table[row])
        assert (np.abs(found - wanted) <= 5 * np.sqrt(wanted) + 5).all()


def test_alternatives_are_repeatable_and_independent() -> None:
    """The same again, whatever else is asked for; another column is another draw."""
    first = score(prompt_alt_tokens_k=8).alt_tokens
    again = score((3,), prompt_alt_tokens_k=8, target_prompt_logprobs=TARGETS).alt_tokens
    assert first is not None
    assert again is not None
    np.testing.assert_array_equal(first.token_ids, again.token_ids)
    assert len({tuple(column) for column in first.token_ids.T.tolist()}) == 8


def test_alternatives_at_temperature_0_are_the_likeliest() -> None:
    """With their logprobs at temperature 1."""
    drawn = score(temperature=0.0, prompt_alt_tokens_k=2).alt_tokens
    assert drawn is not None
    table = expected()
    best = table.argmax(1)
    np.testing.assert_array_equal(drawn.token_ids, np.stack([best, best], 1))
    np.testing.assert_allclose(drawn.logprobs[:, 0], table.max(1), atol=1e-6)
