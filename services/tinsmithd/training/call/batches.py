"""Cuts a large call into batches: other models have turns at the ranks between two of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from enum import Enum

from tinsmithd.training.call.work import ComputeWork

NOMINAL_TOKENS = 512
"""What a turn costs that computes no data, such as an optimizer step or a save."""


class BatchPlace(Enum):
    """Which of a call's batches this is, where the call adds gradients.

    When a batch fails, the ranks take back what the batches before it added.
    """

    WHOLE = "whole"
    FIRST = "first"
    LATER = "later"


def batch_sizes(lengths: Sequence[int], quantum_tokens: int) -> list[int]:
    """Number of data in each batch: as many as `quantum_tokens` allow, but at least one.

    The cuts depend on the call's own data alone, and so does every number that is computed.

    Args:
        lengths: Tokens of each datum of the call.
        quantum_tokens: Maximum tokens of a batch that has more than one datum.
    """
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


def batches_of(work: ComputeWork, sizes: Sequence[int]) -> Iterator[tuple[BatchPlace, ComputeWork]]:
    """The batches of a call, each with its place.

    A call that adds no gradients has nothing to take back: all of its batches are WHOLE.
    """
    start = 0
    for size in sizes:
        end = start + size
        if not work.backward or len(sizes) == 1:
            place = BatchPlace.WHOLE
        else:
            place = BatchPlace.FIRST if start == 0 else BatchPlace.LATER
        yield place, replace(work, data=work.data[start:end], lengths=work.lengths[start:end])
        start = end


def add_metrics(total: dict[str, float], metrics: Mapping[str, float]) -> None:
    """Add a batch's metrics to those of the batches before: sums add up, else the last counts."""
    for name, value in metrics.items():
        total[name] = total.get(name, 0.0) + value if name.endswith(":sum") else value
