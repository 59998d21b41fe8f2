"""How data that begin alike are laid out and kept together."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinsmithd.trainer.composition.compose import compose_data
from tinsmithd.trainer.composition.rounds import MicroBatch, indices_of
from tinsmithd.trainer.prefixes import (
    DEPTH_MAX,
    KEYS_PER_TOKEN_MAX,
    SAVED_TOKENS_MIN,
    SHARED_TOKENS_MIN,
    Layout,
    lay_out,
    units,
)

FEW = SAVED_TOKENS_MIN
WORDS = [np.arange(10 * n, 10 * n + length) for n, length in enumerate((FEW, 3, FEW + 5, 1))]
"""Data are made of a few of them, so many begin alike."""

texts = st.lists(
    st.lists(st.sampled_from(range(len(WORDS))), min_size=1, max_size=6), min_size=1, max_size=12
)


def data_of(numbers: Sequence[Sequence[int]]) -> list[np.ndarray]:
    return [np.concatenate([WORDS[n] for n in some]) for some in numbers]


def rollouts(prompts: int, each: int, prompt: int = 100, new: int = 20) -> list[np.ndarray]:
    """Of each prompt so many, one prompt after the other in turn."""
    rng = np.random.default_rng(0)
    first = [rng.integers(0, 1000, prompt) for _ in range(prompts)]
    return [
        np.concatenate([first[n], rng.integers(0, 1000, new)])
        for _ in range(each)
        for n in range(prompts)
    ]


def assert_right(layout: Layout, tokens: Sequence[np.ndarray]) -> None:
    """Every datum is there with its tokens, their positions, and all that they see."""
    row, positions, places = layout.row(), layout.positions(), layout.places()
    assert len(row) == len(positions) == layout.count == sum(layout.lengths)
    parts = np.split(places, np.cumsum([len(some) for some in tokens])[:-1])
    for datum, (own, where) in enumerate(zip(tokens, parts, strict=True)):
        np.testing.assert_array_equal(row[where], own)
        np.testing.assert_array_equal(positions[where], np.arange(len(own)))
        *above, last = layout.paths[datum]
        assert layout.segments[last].context == tuple(above)
    assert set(places) == set(range(layout.count))
    for number, segment in enumerate(layout.segments):
        assert all(other < number for other in segment.context)
        assert segment.start == sum(layout.segments[n].length for n in segment.context)
        assert segment.length > 0


@given(texts)
def test_each_datum_is_there_with_what_it_sees(numbers: list[list[int]]) -> None:
    """Whatever begins like what; no segment is deeper than `DEPTH_MAX`."""
    tokens = data_of(numbers)
    layout = lay_out(tokens)
    assert_right(layout, tokens)
    assert max(len(path) for path in layout.paths.values()) <= DEPTH_MAX
    assert layout.count <= sum(map(len, tokens))


def test_what_begins_alike_is_there_once() -> None:
    """Rollouts of a prompt; prompts after the same instructions; a datum that is there twice."""
    tokens = rollouts(prompts=3, each=4)
    assert lay_out(tokens).count == 3 * 100 + 12 * 20
    instructions = np.arange(2000, 2050)
    tokens = [np.concatenate([instructions, some]) for some in tokens]
    layout = lay_out(tokens)
    assert layout.count == 50 + 3 * 100 + 12 * 20
    assert {len(path) for path in layout.paths.values()} == {3}
    assert lay_out([tokens[0], tokens[1], tokens[0]]).count == 50 + 2 * 120


def test_few_tokens_are_shared_by_many_or_not_at_all() -> None:
    """What is saved decides; of those that share little with others some may share much."""
    prompt = np.arange(5)
    tokens = [np.append(prompt, answer) for answer in range(100, 104)]
    unshared = lay_out(tokens[::-1])  # 15 tokens
    assert not unshared.shares
    assert [segment.datum for segment in unshared.segments] == [0, 1, 2, 3]
    assert lay_out([*tokens, np.append(prompt, 104)]).count == 5 + 5
    long = np.arange(5, 55)
    pair = [np.concatenate([prompt, long, [answer]]) for answer in (200, 201)]
    assert lay_out([*pair, tokens[0]]).count == 55 + 2 + 6


def test_data_that_share_nothing_stand_in_their_order() -> None:
    """As they always did, and so do those that are not to share."""
    tokens = [np.arange(n, n + FEW + n) for n in range(5)]
    tokens += [tokens[0][: SHARED_TOKENS_MIN - 1], tokens[0][: SHARED_TOKENS_MIN - 1]]
    for share in (True, False):
        layout = lay_out(tokens, share=share)
        assert [segment.datum for segment in layout.segments] == list(range(7))
        assert not layout.shares
        np.testing.assert_array_equal(layout.row(), np.concatenate(tokens))


def test_whoever_nests_thousands_is_laid_out_too() -> None:
    """Each datum is the one before and some more."""
    whole = np.random.default_rng(0).integers(0, 1000, 2000 * FEW)
    tokens = [whole[: n * FEW] for n in range(1, 2000)]
    assert max(len(path) for path in lay_out(tokens).paths.values()) == DEPTH_MAX


@given(texts, st.integers(1, 200), st.integers(1, 4))
def test_units_are_all_data_within_the_budget(
    numbers: list[list[int]], tokens_max: int, ranks: int
) -> None:
    """A datum above it is alone; what a unit is said to compute is the most that it does."""
    tokens = data_of(numbers)
    found = units(tokens, tokens_max=tokens_max, world_size=ranks)
    assert sorted(datum for unit in found for datum in unit.data) == list(range(len(tokens)))
    for unit in found:
        assert unit.tokens <= tokens_max or len(unit.data) == 1
        own = [tokens[datum] for datum in unit.data]
        assert lay_out(own).count <= unit.tokens <= sum(map(len, own))


def test_many_short_answers_to_one_question_are_several_units() -> None:
    """Else the keys of the question would be copied for each of a thousand."""
    question = np.arange(1000)
    tokens = [np.append(question, answer) for answer in range(1000)]
    found = units(tokens, tokens_max=2048, world_size=1)
    for unit in found:
        layout = lay_out([tokens[datum] for datum in unit.data])
        keys = sum(segment.stop for segment in layout.segments)
        assert keys <= KEYS_PER_TOKEN_MAX * layout.count
    assert sum(unit.tokens for unit in found) < 1000 * 1001 / 6


def test_one_datum_many_times_is_several_units() -> None:
    """Nothing more is computed for it, but each has its own targets, losses and gradients."""
    tokens = [np.arange(200)] * 1000
    found = units(tokens, tokens_max=2048, world_size=1)
    assert max(len(unit.data) for unit in found) <= KEYS_PER_TOKEN_MAX
    assert sorted(datum for unit in found for datum in unit.data) == list(range(1000))


def composed(
    tokens: Sequence[np.ndarray], tokens_max: int, plain_tokens_max: int | None, **settings: Any
) -> list[MicroBatch]:
    """What is computed together, on one rank unless it is said otherwise."""
    given = {"world_size": 1, "in_step": False, **settings}
    found = compose_data(
        tokens, share=True, tokens_max=tokens_max, plain_tokens_max=plain_tokens_max, **given
    )
    return [m for round_ in found for of_rank in round_ for m in of_rank]


def count(tokens: Sequence[np.ndarray], every: Sequence[MicroBatch]) -> int:
    """Tokens that are computed."""
    return sum(lay_out([tokens[n] for n in m.indices], share=m.shares).count for m in every)


@pytest.mark.parametrize("plain_tokens_max", [None, 500, 100_000])
def test_a_prompt_that_is_longer_than_a_micro_batch_is_shared_too(
    plain_tokens_max: int | None,
) -> None:
    """Each of its rollouts would be one by itself: some are computed with it, within a quarter more
    than that."""
    tokens = rollouts(prompts=1, each=32, prompt=4000, new=100)
    every = composed(tokens, 2048, plain_tokens_max)
    assert count(tokens, every) < sum(map(len, tokens)) / 6
    for m in every:
        assert count(tokens, [m]) <= 1.25 * 4100
        assert m.recompute == (plain_tokens_max == 500)


def test_a_long_prompt_is_not_shared_where_it_may_not_fit() -> None:
    """Where it did not once, where ranks that walk together would end with it, and where several
    ranks compute it."""
    tokens = rollouts(prompts=1, each=32, prompt=4000, new=100)
    alone: list[dict[str, Any]] = [
        {"long_tokens_max": 4000},
        {"world_size": 2, "in_step": True, "plain_tokens_max": 4000},
        {"world_size": 2, "sequence_parallel": 2},
    ]
    for case in alone:
        every = composed(tokens, 2048, case.pop("plain_tokens_max", 100_000), **case)
        assert not any(m.shares for m in every), case


def test_keys_that_are_copied_take_room() -> None:
    """As much as they keep: with all heads, half as much again as their tokens."""
    tokens = rollouts(prompts=1, each=64, prompt=100, new=30)
    few, many = (composed(tokens, 2048, 700, context_key_tokens=cost) for cost in (0.0, 0.1))
    assert max(count(tokens, [m]) for m in few) > 600
    for m in many:
        layout = lay_out([tokens[n] for n in m.indices])
        above = sum(segment.start for segment in layout.segments)
        assert layout.count + 0.1 * above <= 700
        assert not m.recompute


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("in_step", [False, True])
def test_rollouts_of_a_prompt_stay_together_and_no_rank_is_without_work(
    ranks: int, in_step: bool
) -> None:
    """Each rank computes about as many tokens; shared ones as few times as can be."""
    tokens = rollouts(prompts=4, each=8)
    composed = compose_data(
        tokens,
        share=True,
        tokens_max=1000,
        plain_tokens_max=None,
        world_size=ranks,
        in_step=in_step,
    )
    every = [m for round_ in composed for of_rank in round_ for m in of_rank]
    assert all(m.shares for m in every)
    assert sorted(datum for m in every for datum in m.indices) == list(range(32))

    def computed(some: Sequence[MicroBatch]) -> int:
        return sum(lay_out([tokens[datum] for datum in m.indices]).count for m in some)

    of_ranks = [computed([m for round_ in composed for m in round_[rank]]) for rank in range(ranks)]
    assert sum(of_ranks) == 4 * (100 + 8 * 20)
    assert len(set(of_ranks)) == 1


def test_one_prompt_for_many_ranks_is_computed_by_each() -> None:
    """Rather that than ranks without work."""
    (round_,) = compose_data(
        rollouts(prompts=1, each=8),
        share=True,
        tokens_max=1000,
        plain_tokens_max=None,
        world_size=4,
        in_step=False,
    )
    assert all(len(indices_of(of_rank)) >= 1 for of_rank in round_)


def test_data_that_are_not_to_share_are_composed_as_they_always_were() -> None:
    """Recorded compositions and their bits stay."""
    (round_,) = compose_data(
        rollouts(prompts=1, each=3),
        share=False,
        tokens_max=1000,
        plain_tokens_max=None,
        world_size=1,
        in_step=False,
    )
    assert round_ == ((MicroBatch((0, 1, 2)),),)
