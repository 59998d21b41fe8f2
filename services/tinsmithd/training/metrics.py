"""What Prometheus reads of the Training server beside its calls."""

import time
from collections.abc import Callable, Iterable, Sequence

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from tinsmithd import sizes
from tinsmithd.mismatch import BOUNDS_NATS
from tinsmithd.rpc.series import Series, counter, gauge, histogram
from tinsmithd.tenants import Tenants
from tinsmithd.training.journal import Journal
from tinsmithd.training.models import Models
from tinsmithd.training.ranks import RankGroup, RankMemory, WorkKind

_PREFIX = "tinsmith_training_"
_RANKS_ONLY = "while ranks are at work"
_TENANTS_ONLY = "with metrics_tenants or metrics_tenants_max"
_GPU_ONLY = "while ranks on GPUs are at work"
_PEAK_ONLY = (
    "while ranks are at work whose peak is known: by the setting peak_flops, or of a known GPU "
    "with bfloat16 weights"
)

MODELS = gauge(_PREFIX + "models", "Models that exist.")
MODELS_LOST = gauge(_PREFIX + "models_lost", "Models whose state is gone.")
MODELS_RECOVERING = gauge(
    _PREFIX + "models_recovering", "Models that the ranks do not have yet and should."
)
MODELS_SUSPENDED = gauge(
    _PREFIX + "models_suspended", "Models that are on disk alone until they are called."
)
CALLS_PENDING = gauge(_PREFIX + "calls_pending", "Calls that were taken in and are not answered.")
QUEUED_BYTES = gauge(_PREFIX + "queued_bytes", "Bytes of the calls that wait.")
RANKS = gauge(_PREFIX + "ranks", "Ranks of the group at work; 0 while there is none.")
SILENCE = gauge(
    _PREFIX + "rank_silence_seconds",
    "Since the rank group last said anything; it says something every two seconds.",
    only=_RANKS_ONLY,
)
COMMAND = gauge(
    _PREFIX + "rank_command_seconds",
    "Since the ranks were given the oldest command that they have not finished; 0: they have none.",
    only=_RANKS_ONLY,
)
RESIDENT = gauge(
    _PREFIX + "rank_resident_bytes",
    "The machine's memory that a rank has, as it says.",
    "rank",
    only=_RANKS_ONLY,
)
DEVICE = gauge(
    _PREFIX + "rank_device_bytes",
    "Memory of its GPU that a rank has taken, as it says.",
    "rank",
    only=_GPU_ONLY,
)
DEVICE_SIZE = gauge(
    _PREFIX + "rank_device_size_bytes",
    "All memory of a rank's GPU, as it says.",
    "rank",
    only=_GPU_ONLY,
)
PEAK = gauge(
    _PREFIX + "peak_flops",
    "Operations that all ranks together can make in a second.",
    only=_PEAK_ONLY,
)
WRITABLE = gauge(_PREFIX + "journal_writable", "0 while the journal cannot be written.")
FENCED = gauge(
    _PREFIX + "journal_fenced", "1 once another Training server has the journal: this one ends."
)
EPOCH = gauge(_PREFIX + "epoch", "Processes that had this journal, this one included.")
JOURNAL_BYTES = gauge(
    _PREFIX + "journal_bytes", "Bytes of the journal on disk; room that is free within it counts."
)
COMMITS = histogram(
    _PREFIX + "journal_commit_seconds",
    "How long commits of the journal took, until they were durable.",
)
SNAPSHOTS = counter(_PREFIX + "snapshots_total", "Snapshots of models that were taken.")
SNAPSHOTS_FAILED = counter(
    _PREFIX + "snapshots_failed_total", "Snapshots that could not be taken; they are tried again."
)
SNAPSHOTS_DAMAGED = counter(
    _PREFIX + "snapshots_damaged_total", "Snapshots that were damaged when a model needed them."
)
SNAPSHOT_AGE = gauge(
    _PREFIX + "snapshot_age_seconds",
    "Of the oldest optimizer step that no snapshot has yet, of all models; 0: all are in one.",
)
TOKENS = counter(_PREFIX + "computed_tokens_total", "Tokens that the ranks computed.", "kind")
ENGINE_SECONDS = counter(
    _PREFIX + "engine_seconds_total", "Seconds that the engine took for them.", "kind"
)
FLOPS = counter(
    _PREFIX + "useful_flops_total",
    "Operations that the calls' tokens take: 4 N with LoRA, N the weights that a token meets, and "
    "those of attention; without padding, recomputation, replays and the adapters themselves. It "
    "stays 0 where N is not known.",
)
STEPS = counter(
    _PREFIX + "steps_total",
    "Optimizer steps made, each counted once however often it was replayed.",
)
RESTORED = counter(_PREFIX + "models_restored_total", "Times that a model was brought back.")
SUSPENSIONS = counter(_PREFIX + "models_suspensions_total", "Times that a model left the ranks.")
ATTACHED = counter(_PREFIX + "rank_groups_attached_total", "Rank groups that attached.")
MISMATCH = histogram(
    _PREFIX + "mismatch_nats",
    "Sampled tokens, by how far their logprobs are from those that they were sampled with.",
)
MISMATCH_KL = counter(
    _PREFIX + "mismatch_kl_nats_total",
    "Sum of half the squares of that: over the number of tokens it estimates a divergence.",
)
TENANT_TOKENS = counter(
    _PREFIX + "tenant_computed_tokens_total",
    "Tokens that the ranks computed for a tenant, without replays.",
    "tenant",
    only=_TENANTS_ONLY,
)
TENANT_MODELS = gauge(
    _PREFIX + "tenant_models", "Models of a tenant.", "tenant", only=_TENANTS_ONLY
)
TENANT_PENDING = gauge(
    _PREFIX + "tenant_calls_pending",
    "Calls of a tenant that were taken in and are not answered.",
    "tenant",
    only=_TENANTS_ONLY,
)
SERIES: Sequence[Series] = tuple(
    value for value in list(globals().values()) if isinstance(value, Series)
)


class TrainingCollector(Collector):
    """Models, their calls, the ranks' work, the journal, and what is of tenants.

    Args:
        models: All of them.
        journal: Where they are written down.
        tenants: Names tenants.
        peak_flops: Operations that a rank can make in a second; 0: what is known of its device.
    """

    def __init__(
        self, models: Models, journal: Journal, tenants: Tenants, peak_flops: float
    ) -> None:
        self._models = models
        self._journal = journal
        self._tenants = tenants
        self._peak_flops = peak_flops

    def collect(self) -> Iterable[Metric]:
        """Read everything as it is now."""
        yield from self._of_models()
        yield from self._of_journal()
        yield from self._of_group(self._models.place.current)
        yield from self._work()
        if self._tenants.are_named:
            yield from self._of_tenants()

    def _of_models(self) -> Iterable[Metric]:
        counts = self._models.counts
        yield MODELS.of(counts.models)
        yield MODELS_LOST.of(counts.lost)
        yield MODELS_RECOVERING.of(counts.recovering)
        yield MODELS_SUSPENDED.of(counts.suspended)
        yield CALLS_PENDING.of(counts.pending_calls)
        yield QUEUED_BYTES.of(self._models.quotas.queued_bytes())

    def _of_journal(self) -> Iterable[Metric]:
        journal, counts = self._journal, self._models.place.counts
        yield WRITABLE.of(journal.writable)
        yield FENCED.of(journal.fenced.is_set())
        yield EPOCH.of(journal.epoch)
        yield JOURNAL_BYTES.of(journal.nbytes)
        yield COMMITS.of_durations(journal.commits)
        yield SNAPSHOTS.of(counts.snapshots)
        yield SNAPSHOTS_FAILED.of(counts.snapshots_failed)
        yield SNAPSHOTS_DAMAGED.of(counts.snapshots_damaged)
        oldest_s = min(list(counts.unkept_since_s.values()), default=None)
        yield SNAPSHOT_AGE.of(0.0 if oldest_s is None else time.monotonic() - oldest_s)

    def _of_group(self, group: RankGroup | None) -> Iterable[Metric]:
        yield RANKS.of(0 if group is None else group.world_size)
        if group is None:
            return
        vitals = group.vitals
        yield SILENCE.of(vitals.silence_s)
        yield COMMAND.of(vitals.command_s)
        parts: Sequence[tuple[Series, Callable[[RankMemory], int]]] = (
            (RESIDENT, lambda memory: memory.resident_bytes),
            (DEVICE, lambda memory: memory.device_bytes),
            (DEVICE_SIZE, lambda memory: memory.device_size_bytes),
        )
        for series, part in parts:
            found = {str(rank): float(part(memory)) for rank, memory in vitals.memory.items()}
            yield series.by_one({rank: value for rank, value in found.items() if value})
        device = group.identity.get("device", "")
        peak = self._peak_flops or sizes.peak_flops(device, group.info.dtype)
        if peak is not None:
            yield PEAK.of(peak * group.world_size)

    def _work(self) -> Iterable[Metric]:
        counts = self._models.place.counts
        yield TOKENS.by_one({kind: counts.tokens[kind] for kind in WorkKind})
        yield ENGINE_SECONDS.by_one({kind: counts.engine_s[kind] for kind in WorkKind})
        yield FLOPS.of(counts.flops)
        yield STEPS.of(counts.steps)
        yield RESTORED.of(counts.restored)
        yield SUSPENSIONS.of(counts.suspended)
        yield ATTACHED.of(counts.rank_groups)
        found = counts.mismatch
        yield MISMATCH.of_buckets(BOUNDS_NATS, found.tokens, found.apart_nats)
        yield MISMATCH_KL.of(found.kl_nats)

    def _of_tenants(self) -> Iterable[Metric]:
        yield TENANT_TOKENS.by_one(self._models.place.counts.of_tenants.amounts())
        models: dict[str, int] = {}
        pending: dict[str, int] = {}
        for owner, counts in self._models.by_owner().items():
            label = self._tenants.label(owner)
            models[label] = models.get(label, 0) + counts.models
            pending[label] = pending.get(label, 0) + counts.pending_calls
        yield TENANT_MODELS.by_one(models)
        yield TENANT_PENDING.by_one(pending)
