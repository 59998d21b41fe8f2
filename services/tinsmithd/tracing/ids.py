"""Ids of spans, and how they go from process to process: W3C `traceparent`.

What else that standard has, `tracestate` and baggage, is text of callers; it is not passed on.
"""

import re
from typing import NamedTuple

TRACEPARENT = "traceparent"
_FORM = re.compile("00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")


class SpanIds(NamedTuple):
    """Which span.

    Attributes:
        trace_id: 128 bits, not 0.
        span_id: 64 bits, not 0.
        flags: 8 bits; the lowest says that the span is collected.
        remote: Whether another process began it.
    """

    trace_id: int
    span_id: int
    flags: int
    remote: bool = False

    @property
    def traceparent(self) -> str:
        """As another process is told it."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{self.flags:02x}"


def read_traceparent(text: object) -> SpanIds | None:
    """Read what another process, or a caller, says; None where that is no such text.

    Of a later version of the standard nothing is read.
    """
    if not isinstance(text, str) or (found := _FORM.fullmatch(text)) is None:
        return None
    trace_id, span_id, flags = (int(part, 16) for part in found.groups())
    if not trace_id or not span_id:
        return None
    return SpanIds(trace_id, span_id, flags & 1, remote=True)
