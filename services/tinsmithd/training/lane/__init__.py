"""Who is next: one model's ordered queue of calls, and the turns that all models share."""

from tinsmithd.training.lane.answer_recorder import ReadAnswer
from tinsmithd.training.lane.census import Census
from tinsmithd.training.lane.context import LaneContext
from tinsmithd.training.lane.interface import CallExecutor, Effect, TakeTurn
from tinsmithd.training.lane.lane import Lane
from tinsmithd.training.lane.limits import LaneLimits
from tinsmithd.training.lane.turns import Turns
from tinsmithd.training.lane.waiting import QueuedBytes

__all__ = [
    "CallExecutor",
    "Census",
    "Effect",
    "Lane",
    "LaneContext",
    "LaneLimits",
    "QueuedBytes",
    "ReadAnswer",
    "TakeTurn",
    "Turns",
]
