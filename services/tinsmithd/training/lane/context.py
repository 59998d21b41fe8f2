"""What the parts of a lane share."""

from collections.abc import Callable
from dataclasses import dataclass, field

from tinsmithd.training.call import Call
from tinsmithd.training.journal import Journal
from tinsmithd.training.lane.census import Census
from tinsmithd.training.lane.interface import CallExecutor
from tinsmithd.training.lane.limits import LaneLimits
from tinsmithd.training.lane.waiting import QueuedBytes


@dataclass(frozen=True)
class LaneContext:
    """Whose lane it is, and what it works with.

    Attributes:
        model_id: Whose calls.
        limits: Its bounds.
        journal: Where calls and answers are written down.
        executor: Carries the calls out, and counts what the journal holds of them.
        admit: Refuses a new call that is too much for whose model it is; told whether others wait
            for it.
        queued: Counts the bytes that wait, of all lanes of its owner.
        census: Counts the lanes of this process.
    """

    model_id: str
    limits: LaneLimits
    journal: Journal
    executor: CallExecutor
    admit: Callable[[Call, bool], None] = lambda call, is_next: None
    queued: QueuedBytes = field(default_factory=QueuedBytes)
    census: Census = field(default_factory=Census)
