"""How data are cut into micro-batches."""

import numpy as np
import pytest

from busy_share import CALLS, RANKS, busy_share
from tinsmithd.trainer.composition.compose import compose, cost
from tinsmithd.trainer.composition.micro_batches import cut, cut_in_step
from tinsmithd.trainer.composition.rounds import decode, encode, indices_of


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_every_datum_is_in_one_micro_batch_within_the_budget(seed: int, world_size: int) -> None:
    """A datum above the budget is alone; two micro-batches are never both under half full."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 120, int(rng.integers(1, 40))).tolist()
    batches = cut(lengths, tokens_max=100, world_size=world_size)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in batch) for batch in batches]
    budget = min(100, -(-sum(lengths) // world_size))
    for batch, total in zip(batches, sums, strict=True):
        assert total <= budget or len(batch) == 1
    assert sum(2 * total <= budget for total in sums) <= 1


def test_the_longest_come_first_and_equal_ones_stand_together() -> None:
    """Equal lengths in a row are one batch to the attention."""
    assert cut([3, 9, 3, 9, 1], tokens_max=100, world_size=1) == [[1, 3, 0, 2, 4]]


def test_the_budget_shrinks_so_that_every_rank_has_work() -> None:
    """Four equal data on two ranks are two each, though all would fit on one."""
    assert cut([5, 5, 5, 5], tokens_max=100, world_size=2) == [[0, 1], [2, 3]]


def test_fewer_data_than_ranks_are_one_each() -> None:
    """The ranks without work have none in the list."""
    assert cut([7], tokens_max=100, world_size=4) == [[0]]


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("seed", range(5))
def test_in_step_no_micro_batch_is_larger_than_its_round_needs(seed: int, ranks: int) -> None:
    """The budget, or the longest datum of the round, which comes first; no datum is lost."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 250, int(rng.integers(1, 60))).tolist()
    rounds = cut_in_step(lengths, tokens_max=100, world_size=ranks)
    assert sorted(i for r in rounds for m in r for i in m) == list(range(len(lengths)))
    for of_ranks in rounds:
        sums = [sum(lengths[i] for i in indices) for indices in of_ranks]
        assert max(sums) <= max(100, max(lengths[i] for m in of_ranks for i in m))
    longest = [max(lengths[i] for m in of_ranks for i in m) for of_ranks in rounds]
    assert longest == sorted(longest, reverse=True)


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("seed", range(5))
def test_ranks_on_their_own_share_outputs_once_and_cost_about_the_same(
    seed: int, ranks: int
) -> None:
    """One round; the dearest rank costs no more than the mean and one micro-batch; each recomputes
    for itself."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 250, int(rng.integers(ranks, 90))).tolist()
    (round_,) = compose(
        lengths, tokens_max=100, plain_tokens_max=120, world_size=ranks, in_step=False
    )
    assert sorted(i for of_rank in round_ for i in indices_of(of_rank)) == list(range(len(lengths)))
    costs = [[sum(cost(lengths[i]) for i in m.indices) for m in of_rank] for of_rank in round_]
    dearest = max(map(sum, costs))
    assert dearest <= sum(map(sum, costs)) / ranks + max(map(max, filter(None, costs)))
    for of_rank in round_:
        for m in of_rank:
            assert m.recompute == (sum(lengths[i] for i in m.indices) > 120)


def test_one_rank_computes_as_it_always_did() -> None:
    """A round for each micro-batch, the longest first: recorded compositions and their bits."""
    rounds = compose(
        [3, 9, 3, 9, 1], tokens_max=12, plain_tokens_max=8, world_size=1, in_step=False
    )
    found = [[(m.indices, m.recompute) for m in of_rank] for (of_rank,) in rounds]
    assert found == [[((1,), True)], [((3,), True)], [((0, 2, 4), False)]]


@pytest.mark.parametrize("in_step", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_what_is_too_long_for_a_rank_is_spread_over_neighbours(seed: int, in_step: bool) -> None:
    """What does not fit into a rank's memory, and nothing that fits into a micro-batch."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 900, int(rng.integers(1, 40))).tolist()
    found = compose(
        lengths,
        **{"tokens_max": 100, "plain_tokens_max": 300, "world_size": 8, "in_step": in_step},
        sequence_parallel=4,
    )
    assert decode(encode(found, 8), data_count=len(lengths), world_size=8, in_step=in_step) == found
    spread = {i for r in found for of in r for m in of for i in m.indices if m.ranks == 4}
    whole = set(range(len(lengths))) - spread
    assert all(lengths[i] > 100 for i in spread)
    assert all(lengths[i] <= 300 for i in whole)
    for micro_batch in (m for round_ in found for of_rank in round_ for m in of_rank):
        if micro_batch.ranks == 4:
            assert len(micro_batch.indices) == 1  # in step, one recomputes if the longest does
            assert micro_batch.recompute or lengths[micro_batch.indices[0]] <= 4 * 300


@pytest.mark.parametrize("in_step", [False, True])
def test_a_datum_that_others_would_wait_for_is_spread(in_step: bool) -> None:
    """Not one that costs no more than a rank's share, nor one of fewer tokens than ranks."""

    def spread(*lengths: int, tokens_max: int = 100) -> list[int]:
        found = compose(
            lengths,
            **{"tokens_max": tokens_max, "plain_tokens_max": None},
            **{"world_size": 4, "in_step": in_step, "sequence_parallel": 4},
        )
        return sorted(i for r in found for of in r for m in of for i in m.indices if m.ranks > 1)

    assert spread(1000) == [0]
    assert spread(100) == []
    assert spread(500, 500, 500, 500) == []
    assert spread(30, 1000, 40, 30) == [1]
    assert spread(500, 4000, 500, 3000, 500, 500) == [1, 3]
    assert spread(3, tokens_max=1) == []
    assert spread(4, tokens_max=1) == [0]


@pytest.mark.parametrize("in_step", [False, True])
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("call", CALLS)
def test_ranks_are_busy_nine_tenths_of_a_call(call: str, ranks: int, in_step: bool) -> None:
    """32 data for each rank, of 512 to 32,768 tokens (`docs/sizes.md` has the table)."""
    assert busy_share(CALLS[call][ranks], ranks, in_step=in_step) >= 0.9


@pytest.mark.parametrize("in_step", [False, True])
@pytest.mark.parametrize("ranks", [2, 8, 16])
def test_ranks_are_busy_with_fewer_data_than_there_are_of_them(ranks: int, in_step: bool) -> None:
    """One long datum keeps all of them busy where it may be spread, else one of them."""
    one = [32_768]
    assert busy_share(one, ranks, in_step=in_step, sequence_parallel=ranks) == 1
    assert busy_share(one, ranks, in_step=in_step) == 1 / ranks
    assert busy_share([300, *one], ranks, in_step=in_step, sequence_parallel=ranks) > 0.9
