"""What the gateway counts, for Prometheus to read over HTTP at `metrics_address`."""

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class HttpMetrics:
    """Requests by route and status. No label holds what a caller chose.

    Attributes:
        registry: What is served.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._handled = Counter(
            "tinsmith_gateway_requests",
            "Requests that ended, by route and HTTP status.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "tinsmith_gateway_request_seconds",
            "From a request's arrival to its answer, waiting included.",
            ("method", "route"),
            buckets=_SECONDS,
            registry=self.registry,
        )

    def handled(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request that ended."""
        self._handled.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)
