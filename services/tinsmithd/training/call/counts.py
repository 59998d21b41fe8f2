"""What the ranks did for this process: plain numbers that only rise, for `metrics` to show."""

from dataclasses import dataclass, field

FORWARD = "forward"
FORWARD_BACKWARD = "forward_backward"
REPLAY = "replay"
"""What was computed before, and is once more after a crash; backward, too."""
KINDS = (FORWARD, FORWARD_BACKWARD, REPLAY)


@dataclass
class Counts:
    """Since this process began.

    Attributes:
        rank_groups: Rank groups that came to work.
        tokens: Tokens computed, by kind.
        engine_s: Seconds that the engine took for them, by kind.
        steps: Optimizer steps made, replays left out.
        restored: Times that a model was brought back to ranks.
        suspended: Times that a model left the ranks for another one.
    """

    rank_groups: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    engine_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    steps: int = 0
    restored: int = 0
    suspended: int = 0

    def computed(self, kind: str, tokens: int, engine_s: float) -> None:
        """The ranks computed something."""
        self.tokens[kind] += tokens
        self.engine_s[kind] += engine_s
