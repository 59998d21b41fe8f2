"""What exists: models, how they come and go, and how their calls are carried out and replayed."""

from tinsmithd.training.models.checkpoints import Checkpoints
from tinsmithd.training.models.deposits import Deposits
from tinsmithd.training.models.model import Model, NewModel
from tinsmithd.training.models.model_snapshots import SnapshotRule
from tinsmithd.training.models.models import Models
from tinsmithd.training.models.quotas import QuotaLimits
from tinsmithd.training.models.releases import Releases
from tinsmithd.training.models.seats import SeatLimits
from tinsmithd.training.models.shared import CallLimits, ModelLimits
from tinsmithd.training.models.snapshot_store import (
    MANIFEST_FILE,
    DiskSnapshotStore,
    SnapshotStore,
    check_snapshots,
)
from tinsmithd.training.models.staging import Copies, DiskStaging

__all__ = [
    "MANIFEST_FILE",
    "CallLimits",
    "Checkpoints",
    "Copies",
    "Deposits",
    "DiskSnapshotStore",
    "DiskStaging",
    "Model",
    "ModelLimits",
    "Models",
    "NewModel",
    "QuotaLimits",
    "Releases",
    "SeatLimits",
    "SnapshotRule",
    "SnapshotStore",
    "check_snapshots",
]
