"""What a server counts, for Prometheus to read over HTTP at `metrics_address`.

Calls are counted under the names that go-grpc-prometheus made customary (`grpc_server_*`), so the
dashboards and alerts that the field has for gRPC servers fit. A server adds its own collectors,
`tinsmith_*`. No label holds what a user chose: no model, no checkpoint, no metadata. Tenants have
one where settings say which, and how many.

A scrape is answered by threads of their own: a collector reads what the event loop changes, and
must neither change it nor wait for it.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics

from tinsmithd import keys
from tinsmithd.rpc.collectors import BuildCollector
from tinsmithd.rpc.interceptors import WrappingInterceptor, rebuilt
from tinsmithd.rpc.scrapes import Scrapes
from tinsmithd.rpc.series import Series, counter, histogram
from tinsmithd.tenants import NO_TENANTS, Tenants
from tinsmithd.tls import Certificates

# A second series for each counter, which nobody asks for.
disable_created_metrics()  # type: ignore[no-untyped-call]

Labels = tuple[str, str, str]
_LABELS: Labels = ("grpc_type", "grpc_service", "grpc_method")
STARTED = counter("grpc_server_started_total", "Calls that began.", *_LABELS)
HANDLED = counter(
    "grpc_server_handled_total", "Calls that ended, by status code.", *_LABELS, "grpc_code"
)
SECONDS = histogram(
    "grpc_server_handling_seconds",
    "From a call's arrival to its end, waiting for turns and ranks included.",
    *_LABELS,
)
OF_TENANTS = counter(
    "tinsmith_tenant_calls_total",
    "Calls that ended, by tenant and status code.",
    *("tenant", "grpc_code"),
    only="with metrics_tenants or metrics_tenants_max",
)
SERIES: Sequence[Series] = (STARTED, HANDLED, SECONDS, OF_TENANTS)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_CODES = {code.value[0]: code.name.title().replace("_", "") for code in grpc.StatusCode}
# As Go spells them.
_CANCELED = "Canceled"
_CODES[grpc.StatusCode.OK.value[0]] = "OK"
_CODES[grpc.StatusCode.CANCELLED.value[0]] = _CANCELED


class Metrics:
    """The metrics of one server: construct, `serve`, `close`.

    Args:
        tenants: Names tenants.

    Attributes:
        registry: Where collectors are registered.
        tenants: Names tenants.
    """

    def __init__(self, tenants: Tenants = NO_TENANTS) -> None:
        self.registry = CollectorRegistry()
        self.tenants = tenants
        ProcessCollector(registry=self.registry)
        self.registry.register(BuildCollector())
        self._started = STARTED.counter(self.registry)
        self._handled = HANDLED.counter(self.registry)
        self._seconds = SECONDS.histogram(self.registry, _SECONDS)
        self._of_tenants = OF_TENANTS.counter(self.registry) if tenants.are_named else None
        self._scrapes: Scrapes | None = None

    def expect(self, service: str) -> None:
        """Begin the series of a service's methods at 0.

        A series that begins with its first event never rises by it: an alert would miss the first
        of those that matter most.
        """
        for method in descriptor_pool.Default().FindServiceByName(service).methods:
            labels = (_type(service, method.name), service, method.name)
            self._started.labels(*labels)
            self._seconds.labels(*labels)
            for code in _CODES.values():
                self._handled.labels(*labels, code)

    def serve(self, address: str, certificates: Certificates | None = None) -> int:
        """Answer scrapes at `host:port`; returns the port.

        Args:
            address: Where.
            certificates: What is shown with TLS; None is plain text.

        Raises:
            ConfigError: OpenSSL does not take the certificate.
            OSError: The address cannot be bound.
        """
        self._scrapes = Scrapes(address, self.registry, certificates)
        return self._scrapes.port

    def close(self) -> None:
        """Answer no more scrapes; harmless where nothing was served."""
        if self._scrapes is not None:
            self._scrapes.close()
            self._scrapes = None

    @contextlib.contextmanager
    def call(self, labels: Labels, context: grpc.aio.ServicerContext) -> Iterator[None]:
        """Count what happens within as one call."""
        self._started.labels(*labels).inc()
        begun_s = time.perf_counter()
        code = "OK"
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            code = _CANCELED
            raise
        except BaseException:
            code = _code(context.code())
            raise
        finally:
            self._handled.labels(*labels, code).inc()
            if self._of_tenants is not None:
                tenant = self.tenants.label(keys.current().account)
                self._of_tenants.labels(tenant, code).inc()
            self._seconds.labels(*labels).observe(time.perf_counter() - begun_s)


def _code(code: Any) -> str:
    """Name of a status: grpc.aio gives an enum's member or a number."""
    number = code.value[0] if isinstance(code, grpc.StatusCode) else code
    return _CODES.get(number, "Unknown") if number else "Unknown"


class MetricsInterceptor(WrappingInterceptor):
    """Counts calls of this project's services; to stand before `CallInterceptor`."""

    def __init__(self, metrics: Metrics) -> None:
        super().__init__()
        self._metrics = metrics

    def wrap(self, handler: Any, method: str) -> Any:
        """See `WrappingInterceptor`."""
        service, _, name = method.removeprefix("/").partition("/")
        labels = (_type(service, name), service, name)
        behavior = handler.stream_stream or handler.stream_unary
        metrics = self._metrics

        async def counted(requests: Any, context: grpc.aio.ServicerContext) -> Any:
            with metrics.call(labels, context):
                return await behavior(requests, context)

        return rebuilt(handler, counted)


def _type(service: str, name: str) -> str:
    """What the contract says: `CallInterceptor` makes streams of all requests."""
    method = descriptor_pool.Default().FindServiceByName(service).methods_by_name[name]
    if method.client_streaming:
        return "bidi_stream" if method.server_streaming else "client_stream"
    return "server_stream" if method.server_streaming else "unary"
