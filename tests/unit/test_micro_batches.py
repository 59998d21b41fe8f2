"""How data are cut into micro-batches."""

import numpy as np
import pytest

from tinsmithd.trainer.composition.micro_batches import cut


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
