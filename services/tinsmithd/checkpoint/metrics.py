"""What Prometheus reads of the Checkpoint server beside its calls."""

from collections.abc import Iterable

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tinsmithd.checkpoint.catalogue import Catalogue
from tinsmithd.domain import CheckpointKind
from tinsmithd.errors import TinsmithError


class CheckpointCollector(Collector):
    """How many checkpoints there are."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def collect(self) -> Iterable[Metric]:
        """One gauge; none while the catalogue cannot be read, which health says."""
        family = GaugeMetricFamily(
            "tinsmith_checkpoint_checkpoints", "Checkpoints that there are.", labels=["kind"]
        )
        try:
            for kind in CheckpointKind:
                family.add_metric([kind], self._catalogue.count(kind))
        except TinsmithError:
            return
        yield family
