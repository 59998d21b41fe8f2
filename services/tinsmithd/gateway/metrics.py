"""What the gateway counts, for Prometheus to read over HTTP at `metrics_address`."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from tinsmithd.rpc.collectors import BuildCollector
from tinsmithd.rpc.series import Series, counter, gauge, histogram
from tinsmithd.tenants import NO_TENANTS, Tenants

_PREFIX = "tinsmith_gateway_"
_FAILURE = 500
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

HANDLED = counter(
    _PREFIX + "requests_total",
    "Requests that ended, by route and HTTP status.",
    *("method", "route", "status"),
)
FAILURES = counter(_PREFIX + "failures_total", "Requests that were answered with a status of 5xx.")
SECONDS = histogram(
    _PREFIX + "request_seconds",
    "From a request's arrival to its answer, waiting included.",
    *("method", "route"),
)
RUNNING = gauge(_PREFIX + "requests_running", "Requests under way, those that wait included.")
RUNNING_MAX = gauge(
    _PREFIX + "requests_running_max", "Requests that may be: the setting requests_max."
)
RESULTS = gauge(
    _PREFIX + "results_under_way", "Futures of SDKs whose result the cluster does not have yet."
)
RESULTS_MAX = gauge(_PREFIX + "results_under_way_max", "Futures that may be.")
RESULTS_KEPT_BYTES = gauge(
    _PREFIX + "results_kept_bytes", "Bytes of results that are kept for those who ask again."
)
SESSIONS = gauge(_PREFIX + "sessions", "Sessions of SDKs that are remembered.")
OF_TENANTS = counter(
    _PREFIX + "tenant_requests_total",
    "Requests with a good key that ended, by tenant and HTTP status.",
    *("tenant", "status"),
    only="with metrics_tenants or metrics_tenants_max",
)
SERIES: Sequence[Series] = tuple(
    value for value in list(globals().values()) if isinstance(value, Series)
)


@dataclass(frozen=True)
class Held:
    """What the SDK's room has in memory.

    Attributes:
        results, results_max: Results under way, and how many may be.
        kept_bytes: Bytes of results that are kept.
        sessions: Sessions that are remembered.
    """

    results: int = 0
    results_max: int = 0
    kept_bytes: int = 0
    sessions: int = 0


class HttpMetrics(Collector):
    """Requests by route and status. No label holds what a caller chose; tenants have one where
    settings say which.

    Args:
        tenants: Names tenants.

    Attributes:
        registry: What is served.
        running: Says how many requests are under way, and how many may be.
        held: Says what the SDK's room has in memory.
    """

    def __init__(self, tenants: Tenants = NO_TENANTS) -> None:
        self.registry = CollectorRegistry()
        self.running: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self.held: Callable[[], Held] = Held
        self._tenants = tenants
        ProcessCollector(registry=self.registry)
        self.registry.register(BuildCollector())
        self.registry.register(self)
        self._handled = HANDLED.counter(self.registry)
        self._failures = FAILURES.counter(self.registry)
        self._seconds = SECONDS.histogram(self.registry, _SECONDS)
        self._of_tenants = OF_TENANTS.counter(self.registry) if tenants.are_named else None

    def handled(
        self, method: str, route: str, status: int, seconds: float, tenant: str = ""
    ) -> None:
        """Count one request that ended.

        Args:
            method, route: What was asked.
            status: The answer.
            seconds: What it took.
            tenant: Who asked; empty: somebody without a good key.
        """
        self._handled.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)
        if status >= _FAILURE:
            self._failures.inc()
        if self._of_tenants is not None and tenant:
            self._of_tenants.labels(self._tenants.label(tenant), str(status)).inc()

    def collect(self) -> Iterable[Metric]:
        """What there is now."""
        running, running_max = self.running()
        yield RUNNING.of(running)
        yield RUNNING_MAX.of(running_max)
        held = self.held()
        yield RESULTS.of(held.results)
        yield RESULTS_MAX.of(held.results_max)
        yield RESULTS_KEPT_BYTES.of(held.kept_bytes)
        yield SESSIONS.of(held.sessions)
