"""Where the tokens of a datum come from: positions of sequences that the service sampled.

Tinsmith's losses need none of it: spans are checked, kept with the datum and not sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tinsmith import _check
from tinsmith._check import refuse
from tinsmith.types._values import Value


@dataclass(frozen=True, eq=False, kw_only=True)
class _Span(Value):
    sequence_id: str
    offset: int = 0
    length: int

    def __post_init__(self) -> None:
        name = f"{type(self).__name__}."
        if not _check.text(self.sequence_id, f"{name}sequence_id"):
            raise refuse(f"{name}sequence_id", "must not be empty", "MISSING_FIELD")
        for field in ("offset", "length"):
            value = _check.whole(getattr(self, field), f"{name}{field}", 0)
            object.__setattr__(self, field, value)


@dataclass(frozen=True, eq=False, kw_only=True)
class PromptProvenanceSpan(_Span):
    """Positions of the prompt that a sequence was sampled for.

    Attributes:
        sequence_id: `SampledSequence.sequence_id`.
        offset: The first of the positions.
        length: How many.

    Raises:
        InvalidArgumentError: The id is empty, or a number negative (also a ValueError).
    """


@dataclass(frozen=True, eq=False, kw_only=True)
class SampledProvenanceSpan(_Span):
    """Positions of a sequence's sampled tokens; attributes as `PromptProvenanceSpan`."""


ProvenanceSpan = PromptProvenanceSpan | SampledProvenanceSpan
ProvenanceSpans = list[ProvenanceSpan]


def spans_of(given: object, field: str) -> list[ProvenanceSpan]:
    """A list of spans.

    Raises:
        InvalidArgumentError: It is something else.
    """
    if isinstance(given, str | _Span) or not isinstance(given, Iterable):
        raise refuse(field, f"expected a list of spans, got {type(given).__name__}")
    spans = list(given)
    for index, span in enumerate(spans):
        if not isinstance(span, _Span):
            why = f"expected a PromptProvenanceSpan or a SampledProvenanceSpan, got {_kind(span)}"
            raise refuse(f"{field}[{index}]", why)
    return [span.copied() for span in spans]


def check_tiling(spans: Sequence[ProvenanceSpan], positions: int, field: str) -> None:
    """Refuse spans that do not cover so many positions exactly."""
    covered = sum(span.length for span in spans)
    if covered != positions:
        why = f"the spans cover {covered} positions, and there are {positions}"
        raise refuse(field, why, "INVALID_SHAPE")


def _kind(value: object) -> str:
    return type(value).__name__
