"""Cuts a large call into batches: other models have turns at the ranks between two of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from enum import Enum

from tinsmithd.training.call.work import ComputeWork

NOMINAL_TOKENS = 512
"""What a turn costs that computes no data, such as an optimizer step or a save."""

LONGEST_DATA = 4
"""A batch of several ranks has this many times its longest datum for each of them, or more."""


class BatchPlace(Enum):
    """Which of a call's batches this is, where the call adds gradients.

    When a batch fails, the ranks take back what the batches before it added.
    """

    WHOLE = "whole"
    FIRST = "first"
    LATER = "later"


def batch_sizes(lengths: Sequence[int], quantum_tokens: int, ranks: int = 1) -> list[int]:
    """Number of data in each batch: as many as `quantum_tokens` allow, but at least one.

    Several ranks compute a batch together, so it has a quantum for each of them, or more where data
    are long: what is dealt out evenly is some times the longest datum. And the batches of a call
    are of like size, since a small last one would leave ranks without work.

    The cuts depend on the call's own data and the number of ranks alone, and so does every number
    that is computed.

    Args:
        lengths: Tokens of each datum of the call.
        quantum_tokens: Maximum tokens of a batch that has more than one datum, on one rank.
        ranks: Number of ranks.
    """
    if ranks > 1:
        return _even_sizes(lengths, ranks * max(quantum_tokens, LONGEST_DATA * max(lengths)))
    sizes: list[int] = []
    room = 0
    for length in lengths:
        if sizes and length <= room:
            sizes[-1] += 1
            room -= length
        else:
            sizes.append(1)
            room = quantum_tokens - length
    return sizes


def _even_sizes(lengths: Sequence[int], tokens_max: int) -> list[int]:
    """As few batches as keep to `tokens_max` on average, of like size."""
    total, sizes, tokens = sum(lengths), [0], 0
    count = -(-total // tokens_max)
    for length in lengths:
        if tokens * count >= total * len(sizes):
            sizes.append(0)
        sizes[-1] += 1
        tokens += length
    return sizes


def batches_of(work: ComputeWork, sizes: Sequence[int]) -> Iterator[tuple[BatchPlace, ComputeWork]]:
    """The batches of a call, each with its place.

    A call that adds no gradients has nothing to take back: all of its batches are WHOLE.
    """
    if len(sizes) == 1:
        yield BatchPlace.WHOLE, work
        return
    start = 0
    for size in sizes:
        end = start + size
        if not work.backward:
            place = BatchPlace.WHOLE
        else:
            place = BatchPlace.FIRST if start == 0 else BatchPlace.LATER
        yield place, replace(work, data=work.data[start:end], lengths=work.lengths[start:end])
        start = end


def add_metrics(total: dict[str, float], metrics: Mapping[str, float]) -> None:
    """Add a batch's metrics to those of the batches before: sums add up, else the last counts."""
    for name, value in metrics.items():
        total[name] = total.get(name, 0.0) + value if name.endswith(":sum") else value
