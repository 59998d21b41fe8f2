"""What Prometheus reads of the Sampler beside its calls."""

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tinsmithd.sampler.admission import SamplerScheduler

_PREFIX = "tinsmith_sampler_"


class SamplerCollector(Collector):
    """Requests, adapters and tokens."""

    def __init__(self, scheduler: SamplerScheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterable[Metric]:
        """Read everything as it is now."""
        scheduler = self._scheduler
        for name, text, value in (
            ("requests_running", "Requests that have a place.", scheduler.running),
            ("requests_waiting", "Requests that wait for a place.", scheduler.waiting),
            ("requests_fetching", "Requests whose adapter is on its way.", scheduler.fetching),
            ("adapters", "Adapters in memory, or on their way to it.", scheduler.adapters),
        ):
            yield GaugeMetricFamily(_PREFIX + name, text, value)
        for name, text, value in (
            ("prompt_tokens", "Tokens of the prompts of requests begun.", scheduler.prompt_tokens),
            ("sampled_tokens", "Tokens sampled.", scheduler.sampled_tokens),
        ):
            yield CounterMetricFamily(_PREFIX + name, text, value)
