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
        admission, engine = self._admission, self._admission.stats()
        for name, text, value in (
            ("requests_running", "Requests that have a place.", admission.running),
            ("requests_waiting", "Requests that wait for a place.", admission.waiting),
            ("requests_fetching", "Requests whose adapter is on its way.", admission.fetching),
            ("adapters", "Adapters in memory, or on their way to it.", admission.adapters),
            ("adapters_bytes", "Bytes of adapters in memory.", admission.loaded.nbytes),
            ("sequences", "Sequences that the engine computes.", engine.sequences),
            ("engine_waiting", "Requests that wait for room in the engine.", engine.waiting),
            (
                "kv_tokens",
                "Tokens whose keys and values are held, or room for them.",
                engine.kv_tokens,
            ),
            ("kv_tokens_max", "Room for tokens' keys and values.", engine.kv_tokens_max),
        ):
            yield GaugeMetricFamily(_PREFIX + name, text, value)
        for name, text, value in (
            ("prompt_tokens", "Tokens of the prompts of requests begun.", admission.prompt_tokens),
            ("sampled_tokens", "Tokens sampled.", admission.sampled_tokens),
            ("prompt_tokens_computed", "Prompts' tokens computed.", engine.prompt_tokens_computed),
            ("prompt_tokens_cached", "Prompts' tokens cached.", engine.prompt_tokens_cached),
            ("adapters_ahead", "Adapters brought in before a call asked.", admission.loaded.ahead),
            (
                "adapters_ahead_used",
                "Those of them that a call asked for.",
                admission.loaded.ahead_used,
            ),
            ("steps", "Forwards of the engine.", engine.steps),
            (
                "step_rows",
                "Tokens in all of them: the mean batch is rows / steps.",
                engine.step_rows,
            ),
        ):
            yield CounterMetricFamily(_PREFIX + name, text, value)
