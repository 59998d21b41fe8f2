"""What the ranks did for this process: plain numbers that only rise, for `metrics` to show."""

from dataclasses import dataclass, field
from enum import StrEnum

from tinsmithd.mismatch import Mismatch


class WorkKind(StrEnum):
    """Why tokens were computed. REPLAY: once more after a crash, with the backward pass or not."""

    FORWARD = "forward"
    FORWARD_BACKWARD = "forward_backward"
    REPLAY = "replay"


@dataclass
class Counts:
    """Since this process began.

    Attributes:
        rank_groups: Rank groups that attached.
        tokens: Tokens computed, by kind.
        engine_s: Seconds that the engine took for them, by kind.
        mismatch: Of all sampled tokens that were computed, without replays.
        steps: Optimizer steps made, without replays.
        restored: Times that a model was brought back to ranks.
        suspended: Times that a model left the ranks for another one.
    """

    rank_groups: int = 0
    tokens: dict[WorkKind, int] = field(default_factory=lambda: dict.fromkeys(WorkKind, 0))
    engine_s: dict[WorkKind, float] = field(default_factory=lambda: dict.fromkeys(WorkKind, 0.0))
    mismatch: Mismatch = field(default_factory=Mismatch)
    steps: int = 0
    restored: int = 0
    suspended: int = 0

    def computed(
        self, kind: WorkKind, tokens: int, engine_s: float, mismatch: Mismatch | None = None
    ) -> None:
        """The ranks computed a batch."""
        self.tokens[kind] += tokens
        self.engine_s[kind] += engine_s
        if mismatch is not None and kind is not WorkKind.REPLAY:
            self.mismatch.include(mismatch)
