"""What Prometheus reads of the Checkpoint server beside its calls."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from tinsmithd.checkpoint.catalogue import Catalogue
from tinsmithd.domain import CheckpointKind
from tinsmithd.errors import TinsmithError
from tinsmithd.rpc.budget import Budget
from tinsmithd.rpc.series import Series, counter, gauge
from tinsmithd.tenants import Tenants

_PREFIX = "tinsmith_checkpoint_"
STORED_INTERVAL_S = 60.0
"""How old what tenants have stored may be: to add it up reads what is known of every checkpoint."""

CHECKPOINTS = gauge(_PREFIX + "checkpoints", "Checkpoints that there are.", "kind")
STAGED_BYTES = gauge(_PREFIX + "staged_bytes", "Bytes of checkpoints that are being written.")
STAGED_BYTES_MAX = gauge(
    _PREFIX + "staged_bytes_max", "Room for them: the setting staged_bytes_max."
)
SWEEPS_FAILED = counter(
    _PREFIX + "sweeps_failed_total", "Times that what expired could not be removed."
)
TENANT_STORED_BYTES = gauge(
    _PREFIX + "tenant_stored_bytes",
    "Bytes of a tenant's checkpoints, of those that metrics name; a minute old at most.",
    "tenant",
    only="with metrics_tenants or metrics_tenants_max",
)
SERIES: Sequence[Series] = (
    *(CHECKPOINTS, STAGED_BYTES, STAGED_BYTES_MAX, SWEEPS_FAILED, TENANT_STORED_BYTES),
)


@dataclass
class Counts:
    """Since this process began.

    Attributes:
        sweeps_failed: Sweeps that failed.
    """

    sweeps_failed: int = 0


class CheckpointCollector(Collector):
    """How many checkpoints there are, and what waits to be one.

    Args:
        catalogue: What there is.
        staged: Bytes of what is being written.
        counts: What was counted besides.
        tenants: Names tenants.
    """

    def __init__(
        self, catalogue: Catalogue, staged: Budget, counts: Counts, tenants: Tenants
    ) -> None:
        self._catalogue = catalogue
        self._staged = staged
        self._counts = counts
        self._tenants = tenants
        self._stored: Mapping[str, int] = {}
        self._stored_s = float("-inf")

    def collect(self) -> Iterable[Metric]:
        """No numbers of checkpoints while the catalogue cannot be read, which health says."""
        yield STAGED_BYTES.of(self._staged.taken)
        yield STAGED_BYTES_MAX.of(self._staged.most)
        yield SWEEPS_FAILED.of(self._counts.sweeps_failed)
        try:
            yield CHECKPOINTS.by_one({kind: self._catalogue.count(kind) for kind in CheckpointKind})
            if self._tenants.are_named:
                yield TENANT_STORED_BYTES.by_one(self._stored_bytes())
        except TinsmithError:
            return

    def _stored_bytes(self) -> Mapping[str, int]:
        now_s = time.monotonic()
        if now_s - self._stored_s > STORED_INTERVAL_S:
            stored = {name: self._catalogue.stored_bytes(name) for name in self._tenants.named()}
            self._stored, self._stored_s = stored, now_s
        return self._stored
