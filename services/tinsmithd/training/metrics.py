"""What Prometheus reads of the Training server beside its calls."""

import itertools
from collections.abc import Iterable

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from tinsmithd.mismatch import BOUNDS_NATS
from tinsmithd.training.journal import Journal
from tinsmithd.training.models import Models
from tinsmithd.training.ranks import WorkKind

_PREFIX = "tinsmith_training_"


class TrainingCollector(Collector):
    """Models, their calls, the ranks' work, and the journal."""

    def __init__(self, models: Models, journal: Journal) -> None:
        self._models = models
        self._journal = journal

    def collect(self) -> Iterable[Metric]:
        """Read everything as it is now."""
        yield from self._gauges()
        yield from self._work()
        yield from self._mismatch()
        yield SummaryMetricFamily(
            _PREFIX + "journal_commit_seconds",
            "How long commits of the journal took, until they were durable.",
            count_value=self._journal.commits,
            sum_value=self._journal.commit_s,
        )

    def _gauges(self) -> Iterable[Metric]:
        lanes = [model.lane for model in self._models.list()]
        group = self._models.place.current
        for name, text, value in (
            ("models", "Models that exist.", len(lanes)),
            ("models_lost", "Models whose state is gone.", sum(lane.lost for lane in lanes)),
            (
                "models_recovering",
                "Models that the ranks do not have yet.",
                sum(lane.recovering for lane in lanes),
            ),
            (
                "models_suspended",
                "Models that are on disk alone until they are called.",
                sum(lane.suspended for lane in lanes),
            ),
            (
                "calls_pending",
                "Calls that were taken in and are not answered.",
                sum(x.pending for x in lanes),
            ),
            ("ranks", "Ranks of the group at work.", group.world_size if group else 0),
            ("journal_writable", "0 while the journal cannot be written.", self._journal.writable),
            ("epoch", "Processes that had this journal, this one included.", self._journal.epoch),
        ):
            yield GaugeMetricFamily(_PREFIX + name, text, float(value))

    def _work(self) -> Iterable[Metric]:
        counts = self._models.place.counts
        tokens = CounterMetricFamily(
            _PREFIX + "computed_tokens", "Tokens that the ranks computed.", labels=["kind"]
        )
        seconds = CounterMetricFamily(
            _PREFIX + "engine_seconds", "Seconds that the engine took for them.", labels=["kind"]
        )
        for kind in WorkKind:
            tokens.add_metric([kind], counts.tokens[kind])
            seconds.add_metric([kind], counts.engine_s[kind])
        yield tokens
        yield seconds
        for name, text, value in (
            (
                "steps",
                "Optimizer steps made, each counted once however often it was replayed.",
                counts.steps,
            ),
            ("models_restored", "Times that a model was brought back.", counts.restored),
            ("models_suspensions", "Times that a model left the ranks.", counts.suspended),
            ("rank_groups_attached", "Rank groups that attached.", counts.rank_groups),
        ):
            yield CounterMetricFamily(_PREFIX + name, text, value)

    def _mismatch(self) -> Iterable[Metric]:
        found = self._models.place.counts.mismatch
        bounds = [*map(str, BOUNDS_NATS), "+Inf"]
        yield HistogramMetricFamily(
            _PREFIX + "mismatch_nats",
            "Sampled tokens, by how far their logprobs are from those that they were sampled with.",
            buckets=list(zip(bounds, itertools.accumulate(found.tokens), strict=True)),
            sum_value=found.apart_nats,
        )
        yield CounterMetricFamily(
            _PREFIX + "mismatch_kl_nats",
            "Sum of half the squares of that: over the number of tokens it estimates a divergence.",
            found.kl_nats,
        )
