"""Cuts large calls into parts, between which other models have turns at the ranks."""

from collections.abc import Iterator, Mapping, Sequence

from tinsmithd.domain import Datum
from tinsmithd.training.trainer import CallPart

NOMINAL_TOKENS = 512
"""What a turn costs that computes no data, such as an optimizer step or a save."""


def token_count(data: Sequence[Datum]) -> int:
    """Tokens of some data: what computing them costs."""
    return sum(len(datum.tokens) for datum in data)


def cut(
    data: Sequence[Datum], quantum_tokens: int, *, backward: bool
) -> Iterator[tuple[CallPart, Sequence[Datum]]]:
    """The parts of a call: neighbours, as many as `quantum_tokens` allow, but at least one datum.

    Where the cuts are depends on the call's own data alone, and with them every number computed.

    Args:
        data: All data of the call.
        quantum_tokens: Most tokens of a part that has more than one datum.
        backward: Whether gradients are added: only then there is something to undo, and parts
            after the first are not WHOLE.
    """
    start = 0
    while start < len(data):
        end, room = start + 1, quantum_tokens - len(data[start].tokens)
        while end < len(data) and len(data[end].tokens) <= room:
            room -= len(data[end].tokens)
            end += 1
        if not backward or (start == 0 and end == len(data)):
            part = CallPart.WHOLE
        else:
            part = CallPart.FIRST if start == 0 else CallPart.LATER
        yield part, data[start:end]
        start = end


def add_metrics(total: dict[str, float], part: Mapping[str, float]) -> None:
    """Add a part's metrics to those of the parts before: sums add up, of others the last counts."""
    for name, value in part.items():
        total[name] = total.get(name, 0.0) + value if name.endswith(":sum") else value
