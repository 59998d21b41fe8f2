"""What a server counts, for Prometheus to read over HTTP at `metrics_address`.

Calls are counted under the names that go-grpc-prometheus made customary (`grpc_server_*`), so the
dashboards and alerts that the field has for gRPC servers fit. A server adds its own collectors,
`tinsmith_*`. No label holds what a user chose: no model, no checkpoint, no metadata.

A scrape is answered by threads of their own: a collector reads what the event loop changes, and
must neither change it nor wait for it.
"""

import asyncio
import contextlib
import errno
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tinsmithd.rpc.interceptors import WrappingInterceptor

# A second series for each counter, which nobody asks for.
disable_created_metrics()  # type: ignore[no-untyped-call]

Labels = tuple[str, str, str]
_LABELS: Labels = ("grpc_type", "grpc_service", "grpc_method")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_CODES = {code.value[0]: code.name.title().replace("_", "") for code in grpc.StatusCode}
# As Go spells them.
_CANCELED = "Canceled"
_CODES[grpc.StatusCode.OK.value[0]] = "OK"
_CODES[grpc.StatusCode.CANCELLED.value[0]] = _CANCELED


class Metrics:
    """The metrics of one server: construct, `serve`, `close`.

    Attributes:
        registry: Where collectors are registered.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._started = Counter(
            "grpc_server_started", "Calls that began.", _LABELS, registry=self.registry
        )
        self._handled = Counter(
            "grpc_server_handled",
            "Calls that ended, by status code.",
            (*_LABELS, "grpc_code"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "grpc_server_handling_seconds",
            "From a call's arrival to its end, waiting for turns and ranks included.",
            _LABELS,
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._http: Any = None
        self._thread: Any = None

    def serve(self, address: str) -> int:
        """Answer scrapes at `host:port`; returns the port.

        Raises:
            OSError: The address cannot be bound.
        """
        host, _, port = address.rpartition(":")
        try:
            self._http, self._thread = start_http_server(
                int(port), host.strip("[]"), registry=self.registry
            )
        except OSError as error:
            message = f"cannot listen on {address} for metrics: {error.strerror}"
            raise OSError(error.errno or errno.EADDRINUSE, message) from error
        return int(self._http.server_port)

    def close(self) -> None:
        """Answer no more scrapes; harmless where nothing was served."""
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._thread.join()
            self._http = None

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

        build = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        return build(
            counted,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


def _type(service: str, name: str) -> str:
    """What the contract says: `CallInterceptor` makes streams of all requests."""
    method = descriptor_pool.Default().FindServiceByName(service).methods_by_name[name]
    if method.client_streaming:
        return "bidi_stream" if method.server_streaming else "client_stream"
    return "server_stream" if method.server_streaming else "unary"


class ServingCollector(Collector):
    """What health says, by the name that health knows it by.

    Args:
        said: Name to whether it is SERVING.
    """

    def __init__(self, said: Mapping[str, bool]) -> None:
        self._said = said

    def collect(self) -> Iterable[Metric]:
        """One gauge."""
        family = GaugeMetricFamily(
            "tinsmith_serving", "1 while health says SERVING of it.", labels=["service"]
        )
        for name, serving in list(self._said.items()):
            if name:  # the empty one is the process, which answers
                family.add_metric([name], float(serving))
        yield family


class DiskCollector(Collector):
    """The room on the disk that holds a server's data."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterable[Metric]:
        """Two gauges; none while the disk does not answer."""
        try:
            usage = shutil.disk_usage(self._folder)
        except OSError:
            return
        text = "of the file system of data_folder."
        yield GaugeMetricFamily("tinsmith_disk_free_bytes", f"Free bytes {text}", usage.free)
        yield GaugeMetricFamily("tinsmith_disk_size_bytes", f"All bytes {text}", usage.total)
