"""Cuts large calls into parts, between which other models have turns at the ranks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from tinsmithd.training.call.work import ComputeWork
from tinsmithd.training.ranks.interface import CallPart

NOMINAL_TOKENS = 512
"""What a turn costs that computes no data, such as an optimizer step or a save."""


def cut(lengths: Sequence[int], quantum_tokens: int) -> list[int]:
    """How many data each part of a call has: as many as `quantum_tokens` allow, but at least one.

    Where the cuts are depends on the call's own data alone, and with them every number computed.

    Args:
        lengths: Tokens of each datum of the call.
        quantum_tokens: Most tokens of a part that has more than one datum.
    """
    counts: list[int] = []
    room = 0
    for length in lengths:
        if counts and length <= room:
            counts[-1] += 1
            room -= length
        else:
            counts.append(1)
            room = quantum_tokens - length
    return counts


def parts(work: ComputeWork, counts: Sequence[int]) -> Iterator[tuple[CallPart, ComputeWork]]:
    """The parts of a call.

    Only where gradients are added there is something to undo; only then parts are not WHOLE.
    """
    start = 0
    for count in counts:
        end = start + count
        if not work.backward or len(counts) == 1:
            part = CallPart.WHOLE
        else:
            part = CallPart.FIRST if start == 0 else CallPart.LATER
        yield part, replace(work, data=work.data[start:end], lengths=work.lengths[start:end])
        start = end


def add_metrics(total: dict[str, float], part: Mapping[str, float]) -> None:
    """Add a part's metrics to those of the parts before: sums add up, of others the last counts."""
    for name, value in part.items():
        total[name] = total.get(name, 0.0) + value if name.endswith(":sum") else value
