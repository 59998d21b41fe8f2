"""What Prometheus reads of the Sampler beside its calls."""

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tinsmithd.sampler.admission import Admission

_PREFIX = "tinsmith_sampler_"


class SamplerCollector(Collector):
    """Requests, adapters and tokens."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    def collect(self) -> Iterable[Metric]:
        """Read everything as it is now."""
        admission = self._admission
        for name, text, value in (
            ("requests_running", "Requests that have a place.", admission.running),
            ("requests_waiting", "Requests that wait for a place.", admission.waiting),
            ("requests_fetching", "Requests whose adapter is on its way.", admission.fetching),
            ("adapters", "Adapters in memory, or on their way to it.", admission.adapters),
        ):
            yield GaugeMetricFamily(_PREFIX + name, text, value)
        for name, text, value in (
            ("prompt_tokens", "Tokens of the prompts of requests begun.", admission.prompt_tokens),
            ("sampled_tokens", "Tokens sampled.", admission.sampled_tokens),
        ):
            yield CounterMetricFamily(_PREFIX + name, text, value)
