"""What the parts of a lane share."""

from dataclasses import dataclass

from tinsmithd.training.journal import Journal
from tinsmithd.training.lane.interface import CallExecutor
from tinsmithd.training.lane.limits import LaneLimits


@dataclass(frozen=True)
class LaneContext:
    """Whose lane it is, and what it works with.

    Attributes:
        model_id: Whose calls.
        limits: Its bounds.
        journal: Where calls and answers are written down.
        executor: Carries the calls out, and counts what the journal holds of them.
    """

    model_id: str
    limits: LaneLimits
    journal: Journal
    executor: CallExecutor
