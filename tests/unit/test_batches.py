"""Cutting calls into batches."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinsmithd.config import ConfigError, TrainingConfig
from tinsmithd.training.call import BatchPlace, ComputeWork, add_metrics, batch_sizes, batches_of
from tinsmithd.training.call.batches import LONGEST_DATA


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 120), st.booleans())
def test_batches_are_the_call_in_order_and_none_is_too_large(
    lengths: list[int], quantum_tokens: int, backward: bool
) -> None:
    """No datum is lost; only a lone datum exceeds the quantum; no two neighbours fit together
    further than they are; only a cut call that adds gradients says where a batch stands."""
    data = [bytes([index]) for index in range(len(lengths))]
    work = ComputeWork(b"loss", data, lengths, backward)
    sizes = batch_sizes(lengths, quantum_tokens)
    found = list(batches_of(work, sizes))
    assert [datum for _, some in found for datum in some.data] == data
    assert [length for _, some in found for length in some.lengths] == lengths
    for _, some in found:
        assert sum(some.lengths) <= quantum_tokens or len(some.data) == 1
        assert (some.loss, some.backward) == (b"loss", backward)
    for (_, some), (_, after) in itertools.pairwise(found):
        assert sum(some.lengths) + after.lengths[0] > quantum_tokens
    places = [place for place, _ in found]
    if backward and len(found) > 1:
        assert places == [BatchPlace.FIRST, *[BatchPlace.LATER] * (len(found) - 1)]
    else:
        assert set(places) == {BatchPlace.WHOLE}


@given(st.lists(st.integers(1, 50), min_size=1, max_size=80), st.integers(1, 60), st.integers(2, 9))
def test_batches_of_several_ranks_are_alike_and_hold_work_for_each(
    lengths: list[int], quantum_tokens: int, ranks: int
) -> None:
    """As many as quanta for all ranks allow; none is off the mean by more than the longest datum,
    and the mean of several is twice the longest for each rank, or more."""
    sizes = batch_sizes(lengths, quantum_tokens, ranks)
    assert sum(sizes) == len(lengths)
    assert min(sizes) > 0
    starts = itertools.accumulate(sizes, initial=0)
    sums = [sum(lengths[a:b]) for a, b in itertools.pairwise(starts)]
    quantum, longest = ranks * max(quantum_tokens, LONGEST_DATA * max(lengths)), max(lengths)
    mean = sum(lengths) / -(-sum(lengths) // quantum)
    assert mean <= quantum
    assert all(abs(found - mean) <= longest for found in sums)
    if len(sizes) > 1:
        assert mean >= quantum / 2 >= 2 * longest * ranks


def test_sums_add_up_over_batches() -> None:
    """What is not a sum is the last batch's."""
    total: dict[str, float] = {}
    for metrics in ({"loss:sum": 1.5, "x:last": 1.0}, {"loss:sum": 2.0, "x:last": 3.0}):
        add_metrics(total, metrics)
    assert total == {"loss:sum": 3.5, "x:last": 3.0}


def test_a_quantum_of_nothing_is_refused() -> None:
    """Naming the key."""
    with pytest.raises(ConfigError, match=r"training\.quantum_tokens: must be at least 1"):
        TrainingConfig.load(["--quantum-tokens", "0"], {})
