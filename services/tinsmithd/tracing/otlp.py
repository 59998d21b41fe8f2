"""Spans by OpenTelemetry; imported where somebody asks for them."""

import os
import socket
from collections.abc import Sequence

from opentelemetry import trace

from tinsmith.otlp import Exporting
from tinsmithd.tracing.ids import SpanIds
from tinsmithd.tracing.spans import Attributes, Kind, Span

_KINDS = {Kind.INTERNAL: trace.SpanKind.INTERNAL, Kind.SERVER: trace.SpanKind.SERVER}


def to_opentelemetry(ids: SpanIds) -> trace.SpanContext:
    """The ids of a span as OpenTelemetry has them."""
    return trace.SpanContext(
        ids.trace_id, ids.span_id, ids.remote, trace.TraceFlags(ids.flags), trace.TraceState()
    )


class _Made:
    """A `Span`."""

    __slots__ = ("_span", "ids")

    def __init__(self, span: trace.Span) -> None:
        self._span = span
        context = span.get_span_context()
        self.ids = SpanIds(context.trace_id, context.span_id, int(context.trace_flags))

    def say(self, attributes: Attributes) -> None:
        self._span.set_attributes(dict(attributes))

    def rename(self, name: str) -> None:
        self._span.update_name(name)

    def end(self, failure: str = "", end_ns: int = 0) -> None:
        if failure:
            self._span.set_status(trace.StatusCode.ERROR, failure)
        self._span.end(end_ns or None)


class OtlpTracer:
    """A `Tracer`.

    Args:
        process: What kind of process this is.
        endpoint: Where the collector is, `http://host:port` or `https://host:port`; empty leaves it
            to OpenTelemetry's own variables.
        version: Of this server.
    """

    def __init__(self, process: str, endpoint: str, version: str) -> None:
        about = {
            "service.namespace": "tinsmith",
            "service.version": version,
            "service.instance.id": f"{socket.gethostname()}:{os.getpid()}",
        }
        self._exporting = Exporting(f"tinsmith-{process}", endpoint, about)
        self._tracer = self._exporting.provider.get_tracer("tinsmith", version)

    def begin(
        self,
        name: str,
        parent: SpanIds | None,
        attributes: Attributes,
        *,
        kind: Kind = Kind.INTERNAL,
        since_ns: int = 0,
        links: Sequence[SpanIds] = (),
    ) -> Span:
        """See `Tracer`."""
        context = trace.INVALID_SPAN_CONTEXT if parent is None else to_opentelemetry(parent)
        made = self._tracer.start_span(
            name,
            trace.set_span_in_context(trace.NonRecordingSpan(context)),
            _KINDS[kind],
            dict(attributes),
            [trace.Link(to_opentelemetry(ids)) for ids in links],
            since_ns or None,
            record_exception=False,
            set_status_on_exception=False,
        )
        return _Made(made)

    def stop(self, within_s: float) -> None:
        """See `Tracer`."""
        self._exporting.stop(within_s)
