"""What a series of metrics is: its name, kind, text and labels, said once.

A collector makes what a scrape gives of them, and docs/metrics.md is written from them. Names are
`tinsmith_<process>_<what>_<unit>`, without the process where several have the series; counters end
in `_total`. `grpc_server_*` are the names that go-grpc-prometheus made customary.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from tinsmithd.durations import Durations

_TOTAL = "_total"


class Kind(StrEnum):
    """What Prometheus calls it."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Series:
    """All series of one name.

    Attributes:
        name: The name; that of a histogram without `_bucket`, `_sum` and `_count`.
        kind: What it is.
        text: A sentence.
        labels: Names of its labels; `le` of a histogram is not among them.
        only: Where there is none of it otherwise: when it is there, for a person.
    """

    name: str
    kind: Kind
    text: str
    labels: tuple[str, ...] = ()
    only: str = ""

    def of(self, value: float) -> Metric:
        """The one value of a gauge or counter without labels."""
        return self.by({(): value})

    def by(self, values: Mapping[tuple[str, ...], float]) -> Metric:
        """Values by labels, in the order of `labels`."""
        if self.kind is Kind.COUNTER:
            family: Metric = CounterMetricFamily(
                self.name.removesuffix(_TOTAL), self.text, labels=self.labels
            )
        else:
            family = GaugeMetricFamily(self.name, self.text, labels=self.labels)
        for labels, value in values.items():
            family.add_metric(labels, float(value))  # type: ignore[attr-defined]
        return family

    def by_one(self, values: Mapping[str, float]) -> Metric:
        """Values by the only label."""
        return self.by({(label,): value for label, value in values.items()})

    def of_durations(self, durations: Durations) -> Metric:
        """A histogram of durations."""
        buckets = durations.buckets()
        return HistogramMetricFamily(self.name, self.text, buckets, sum_value=durations.sum_s)

    def of_buckets(self, bounds: Sequence[float], counts: Iterable[int], total: float) -> Metric:
        """A histogram.

        Args:
            bounds: Rising.
            counts: Of each bucket alone, one more than bounds.
            total: Sum of what was counted.
        """
        names = [*map(str, bounds), "+Inf"]
        buckets = list(zip(names, map(float, itertools.accumulate(counts)), strict=True))
        return HistogramMetricFamily(self.name, self.text, buckets, sum_value=total)

    def counter(self, registry: CollectorRegistry) -> Counter:
        """A counter that counts by itself."""
        return Counter(self.name.removesuffix(_TOTAL), self.text, self.labels, registry=registry)

    def histogram(self, registry: CollectorRegistry, bounds: Sequence[float]) -> Histogram:
        """A histogram that counts by itself."""
        return Histogram(self.name, self.text, self.labels, buckets=bounds, registry=registry)


def gauge(name: str, text: str, *labels: str, only: str = "") -> Series:
    """A value that rises and falls."""
    return Series(name, Kind.GAUGE, text, labels, only)


def counter(name: str, text: str, *labels: str, only: str = "") -> Series:
    """A value that only rises, until its process ends."""
    return Series(name, Kind.COUNTER, text, labels, only)


def histogram(name: str, text: str, *labels: str, only: str = "") -> Series:
    """Counts by bounds."""
    return Series(name, Kind.HISTOGRAM, text, labels, only)
