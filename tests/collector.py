"""A collector of spans, as OpenTelemetry's protocol has it: a server that keeps what it is sent."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

FAST = {"OTEL_BSP_SCHEDULE_DELAY": "50"}
"""Variables of processes whose spans a test waits for."""
WAIT_S = 30.0


@dataclass(frozen=True)
class Collected:
    """A span that arrived.

    Attributes:
        service: Which process made it.
        parent_id: Empty for one that begins a trace.
        links: Ids of the spans that it has links to.
    """

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: Mapping[str, Any]
    links: Sequence[str]
    error: str
    start_ns: int
    end_ns: int


class Collector(TraceServiceServicer):
    """Takes spans, or keeps those who send them waiting.

    Attributes:
        endpoint: `http://host:port`.
        bodies: Every request, as the bytes that came.
    """

    def __init__(self, *, hangs: bool = False) -> None:
        self._hangs = hangs
        self._spans: list[Collected] = []
        self._changed = threading.Condition()
        self.bodies: list[bytes] = []
        self.asked = threading.Event()
        self._let_go = threading.Event()
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        add_TraceServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.endpoint = f"http://127.0.0.1:{port}"
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:
        """Take spans."""
        self.asked.set()
        if self._hangs:
            self._let_go.wait()
        with self._changed:
            self.bodies.append(request.SerializeToString())
            self._spans += _spans_in(request)
            self._changed.notify_all()
        return pb.ExportTraceServiceResponse()

    @property
    def spans(self) -> Sequence[Collected]:
        """All that came."""
        with self._changed:
            return list(self._spans)

    def until(self, found: Callable[[Sequence[Collected]], Any]) -> Any:
        """Wait until something is found in the spans that came, and return it."""
        end_s = time.monotonic() + WAIT_S
        with self._changed:
            while not (result := found(self._spans)):
                left_s = end_s - time.monotonic()
                assert left_s > 0, sorted({(s.service, s.name) for s in self._spans})
                self._changed.wait(left_s)
            return result

    def stop(self) -> None:
        """Answer nobody any more."""
        self._let_go.set()
        self._server.stop(None).wait()


def _spans_in(request: Any) -> Iterator[Collected]:
    for resource in request.resource_spans:
        service = _values(resource.resource.attributes)["service.name"]
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Collected(
                    service,
                    span.name,
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    _values(span.attributes),
                    [link.span_id.hex() for link in span.links],
                    span.status.message,
                    span.start_time_unix_nano,
                    span.end_time_unix_nano,
                )


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@contextmanager
def collecting(*, hangs: bool = False) -> Iterator[Collector]:
    """A collector for the body of the `with`."""
    collector = Collector(hangs=hangs)
    try:
        yield collector
    finally:
        collector.stop()
