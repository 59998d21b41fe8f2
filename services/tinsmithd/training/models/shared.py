"""What all models of this process share."""

from dataclasses import dataclass

from tinsmithd.owners import inner_id
from tinsmithd.training.journal import Journal
from tinsmithd.training.lane import Census, LaneLimits, Turns
from tinsmithd.training.models.checkpoints import Checkpoints
from tinsmithd.training.models.model_snapshots import SnapshotRule
from tinsmithd.training.models.quotas import NO_QUOTAS, QuotaLimits, Quotas
from tinsmithd.training.models.seats import SeatLimits, Seats
from tinsmithd.training.models.snapshot_store import SnapshotStore
from tinsmithd.training.models.starts import Starts
from tinsmithd.training.ranks import RankGroupPlace


def coming_and_going(owner: str) -> str:
    """Whose turns create and delete models: all of these of an owner count as one model of his."""
    return inner_id(owner, "")


@dataclass(frozen=True)
class CallLimits:
    """Bounds on what calls do; the names are those of the settings.

    Attributes:
        exact_replay: Whether a replay must give the same bits, on ranks of one identity; else it
            must give the same metrics but for rounding. No GPU has to repeat its bits: many kernels
            there add up in any order.
    """

    quantum_tokens: int
    journal_bytes_max: int
    snapshots: SnapshotRule
    rank_max: int = 256
    steps_kept_max: int = 10_000
    exact_replay: bool = True


@dataclass(frozen=True)
class ModelLimits:
    """Bounds on models and calls; the names are those of the settings."""

    models_kept_max: int
    model_idle_ttl_s: float
    seats: SeatLimits
    lane: LaneLimits
    calls: CallLimits
    quotas: QuotaLimits = NO_QUOTAS


@dataclass(frozen=True)
class Shared:
    """What all models of this process share.

    Attributes:
        limits: Bounds.
        checkpoints: Those of the Checkpoint server.
        journal: Where everything is written down.
        snapshot_store: Where states are kept; None where the journal keeps nothing.
        place: Where the rank group is.
        turns: Turns at it.
        seats: Seats at it.
        starts: What ended ranks at its start.
        quotas: What each tenant may have.
        census: Counts their lanes.
    """

    limits: ModelLimits
    checkpoints: Checkpoints
    journal: Journal
    snapshot_store: SnapshotStore | None
    place: RankGroupPlace
    turns: Turns
    seats: Seats
    starts: Starts
    quotas: Quotas
    census: Census
