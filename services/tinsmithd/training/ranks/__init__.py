"""Who computes: what a rank group can be asked, and which one is at work.

Only the server opens `link` and `launcher`, which know the wire and processes.
"""

from tinsmithd.training.ranks.counts import Counts, WorkKind
from tinsmithd.training.ranks.interface import (
    Computed,
    ModelBroken,
    OnOutput,
    OnPiece,
    Pieces,
    RankGroup,
    RankGroupLost,
    RankMemory,
    StateInfo,
    Vitals,
)
from tinsmithd.training.ranks.place import RankGroupPlace

__all__ = [
    "Computed",
    "Counts",
    "ModelBroken",
    "OnOutput",
    "OnPiece",
    "Pieces",
    "RankGroup",
    "RankGroupLost",
    "RankGroupPlace",
    "RankMemory",
    "StateInfo",
    "Vitals",
    "WorkKind",
]
