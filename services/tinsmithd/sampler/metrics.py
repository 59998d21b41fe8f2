"""What Prometheus reads of the Sampler beside its calls."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from tinsmithd.rpc.series import Series, counter, gauge, histogram
from tinsmithd.sampler.admission import Admission

_PREFIX = "tinsmith_sampler_"
_TENANTS_ONLY = "with metrics_tenants or metrics_tenants_max"

RUNNING = gauge(_PREFIX + "requests_running", "Requests that have a place.")
RUNNING_MAX = gauge(_PREFIX + "requests_running_max", "Places: the setting running_max.")
WAITING = gauge(_PREFIX + "requests_waiting", "Requests that wait for a place.")
WAITING_MAX = gauge(
    _PREFIX + "requests_waiting_max", "Requests that may wait: the setting waiting_max."
)
FETCHING = gauge(_PREFIX + "requests_fetching", "Requests whose adapter is on its way.")
ADAPTERS = gauge(_PREFIX + "adapters", "Adapters in memory, or on their way to it.")
ADAPTERS_MAX = gauge(_PREFIX + "adapters_max", "Adapters that memory may have.")
ADAPTERS_BYTES = gauge(_PREFIX + "adapters_bytes", "Bytes of adapters in memory.")
ADAPTERS_BYTES_MAX = gauge(
    _PREFIX + "adapters_bytes_max", "Bytes of adapters that memory may have."
)
SEQUENCES = gauge(_PREFIX + "sequences", "Sequences that the engine computes.")
SEQUENCES_MAX = gauge(
    _PREFIX + "sequences_max", "Sequences that it may compute: the setting batch_rows_max."
)
ENGINE_WAITING = gauge(_PREFIX + "engine_waiting", "Requests that wait for room in the engine.")
KV_TOKENS = gauge(_PREFIX + "kv_tokens", "Tokens whose keys and values are held, or room for them.")
KV_TOKENS_MAX = gauge(
    _PREFIX + "kv_tokens_max", "Room for tokens' keys and values; 0 where the engine does not say."
)
FIRST_TOKEN = histogram(
    _PREFIX + "first_token_seconds",
    "From a request's admission to its first new token: waiting, its adapter and its prompt.",
)
PROMPT_TOKENS = counter(_PREFIX + "prompt_tokens_total", "Tokens of the prompts of requests begun.")
SAMPLED_TOKENS = counter(_PREFIX + "sampled_tokens_total", "Tokens sampled.")
COMPUTED = counter(_PREFIX + "prompt_tokens_computed_total", "Prompts' tokens computed.")
CACHED = counter(_PREFIX + "prompt_tokens_cached_total", "Prompts' tokens cached.")
AHEAD = counter(
    _PREFIX + "adapters_ahead_total", "Adapters brought in before a call asked for them."
)
AHEAD_USED = counter(_PREFIX + "adapters_ahead_used_total", "Those of them that a call asked for.")
STEPS = counter(_PREFIX + "steps_total", "Forwards of the engine.")
STEP_ROWS = counter(
    _PREFIX + "step_rows_total", "Tokens in all of them: the mean batch is rows / steps."
)
TENANT_PROMPT_TOKENS = counter(
    _PREFIX + "tenant_prompt_tokens_total",
    "Tokens of the prompts of a tenant's requests.",
    "tenant",
    only=_TENANTS_ONLY,
)
TENANT_SAMPLED_TOKENS = counter(
    _PREFIX + "tenant_sampled_tokens_total",
    "Tokens sampled for a tenant.",
    "tenant",
    only=_TENANTS_ONLY,
)
SERIES: Sequence[Series] = tuple(
    value for value in list(globals().values()) if isinstance(value, Series)
)


@dataclass(frozen=True)
class Room:
    """How much a Sampler may have at once; the names are those of the settings."""

    running_max: int
    waiting_max: int
    batch_rows_max: int
    adapters_max: int
    adapters_bytes_max: int


class SamplerCollector(Collector):
    """Requests, adapters and tokens.

    Args:
        admission: Has them.
        room: How much of each there may be.
    """

    def __init__(self, admission: Admission, room: Room) -> None:
        self._admission = admission
        self._room = room

    def collect(self) -> Iterable[Metric]:
        """Read everything as it is now."""
        admission, engine, room = self._admission, self._admission.stats(), self._room
        yield RUNNING.of(admission.running)
        yield RUNNING_MAX.of(room.running_max)
        yield WAITING.of(admission.waiting)
        yield WAITING_MAX.of(room.waiting_max)
        yield FETCHING.of(admission.fetching)
        yield ADAPTERS.of(admission.adapters)
        yield ADAPTERS_MAX.of(room.adapters_max)
        yield ADAPTERS_BYTES.of(admission.loaded.nbytes)
        yield ADAPTERS_BYTES_MAX.of(room.adapters_bytes_max)
        yield SEQUENCES.of(engine.sequences)
        yield SEQUENCES_MAX.of(room.batch_rows_max)
        yield ENGINE_WAITING.of(engine.waiting)
        yield KV_TOKENS.of(engine.kv_tokens)
        yield KV_TOKENS_MAX.of(engine.kv_tokens_max)
        yield FIRST_TOKEN.of_durations(admission.first_tokens)
        yield PROMPT_TOKENS.of(admission.prompt_tokens)
        yield SAMPLED_TOKENS.of(admission.sampled_tokens)
        yield COMPUTED.of(engine.prompt_tokens_computed)
        yield CACHED.of(engine.prompt_tokens_cached)
        yield AHEAD.of(admission.loaded.ahead)
        yield AHEAD_USED.of(admission.loaded.ahead_used)
        yield STEPS.of(engine.steps)
        yield STEP_ROWS.of(engine.step_rows)
        if admission.prompt_tokens_of.counts:
            yield TENANT_PROMPT_TOKENS.by_one(admission.prompt_tokens_of.amounts())
            yield TENANT_SAMPLED_TOKENS.by_one(admission.sampled_tokens_of.amounts())
