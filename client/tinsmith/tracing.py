"""Spans of a program's calls, by OpenTelemetry; there are none unless somebody asks for them.

`OTEL_EXPORTER_OTLP_ENDPOINT` asks, and so does `tinsmith.tracing.enable()`, for the clients that
are made from then on; both need `tinsmith[otel]`. A program that has OpenTelemetry set up gets them
with its own spans. The servers go on with the trace where they make spans, too.

A span has the name of a method, how long it took, and the reason that it failed for: no prompt, no
data, no key and no name that the program chose.
"""

import atexit
import contextlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from tinsmith.keys import Metadata

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
LAST_SPANS_S_MAX = 2.0
"""How long a program that ends waits for its last spans to be taken."""
_HOW = "pip install 'tinsmith[otel]'"

_log = logging.getLogger("tinsmith")
_spans: "Spans | None" = None
_stop: Callable[[float], None] | None = None
_said = False


class Spans:
    """The spans of calls.

    Args:
        tracer: OpenTelemetry's.
    """

    def __init__(self, tracer: "Tracer") -> None:
        self._tracer = tracer

    @contextlib.contextmanager
    def call(self, what: str) -> Iterator[None]:
        """The span of one call with all of its attempts, for the body of the `with`."""
        from opentelemetry.trace import SpanKind, StatusCode

        with self._tracer.start_as_current_span(
            f"tinsmith {what}",
            kind=SpanKind.CLIENT,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield
            except BaseException as error:
                span.set_status(StatusCode.ERROR, getattr(error, "reason", "") or _name(error))
                raise

    def shown(self, shown: Callable[[str], Metadata]) -> Callable[[str], Metadata]:
        """What calls show: the span that they are part of, too."""
        from opentelemetry.trace import get_current_span

        def show(method: str) -> Metadata:
            context = get_current_span().get_span_context()
            if not context.is_valid:
                return shown(method)
            ids = f"{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
            return (*shown(method), ("traceparent", f"00-{ids}"))

        return show


def _name(error: BaseException) -> str:
    return type(error).__name__


def enable(endpoint: str = "") -> None:
    """Make spans of the calls of all clients that are made from now on.

    Args:
        endpoint: Collector that takes OTLP over gRPC, `http://host:port`; empty: where the
            program's own OpenTelemetry sends spans, or else what OpenTelemetry's variables name.

    Raises:
        ImportError: OpenTelemetry is not installed.
    """
    global _spans, _stop
    if importlib.util.find_spec("opentelemetry") is None:
        raise ImportError(f"tracing needs OpenTelemetry: {_HOW}")
    from opentelemetry import trace

    if not endpoint and not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        _spans = Spans(trace.get_tracer("tinsmith"))
        return
    if importlib.util.find_spec("opentelemetry.sdk") is None:
        raise ImportError(f"tracing needs OpenTelemetry: {_HOW}")
    from tinsmith.otlp import Exporting

    exporting = Exporting("tinsmith-client", endpoint, {})
    disable()
    _stop = exporting.stop
    _spans = Spans(exporting.provider.get_tracer("tinsmith"))


def disable(within_s: float = LAST_SPANS_S_MAX) -> None:
    """Make no more spans for clients that are made from now on, and send those that there are.

    Args:
        within_s: How long that may take; a program that ends does so for two seconds.
    """
    global _spans, _stop
    stop, _spans, _stop = _stop, None, None
    if stop is not None:
        stop(within_s)


atexit.register(disable)


def of_program() -> Spans | None:
    """The spans that this program asks for; None where it does not, or cannot have them."""
    global _said
    if _spans is None and not _said and _environment_asks(os.environ):
        _said = True
        try:
            enable()
        except (ImportError, ValueError) as error:
            _log.warning("tinsmith: no spans, though %s is set: %s", ENDPOINT_VARIABLES[1], error)
    return _spans


def _environment_asks(env: Any) -> bool:
    disabled = env.get("OTEL_SDK_DISABLED", "").lower() == "true"
    other = env.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp"
    protocol = env.get("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc") != "grpc"
    return not (disabled or other or protocol) and any(map(env.get, ENDPOINT_VARIABLES))
