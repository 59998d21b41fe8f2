"""How much a run does."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """The largest point of each row.

    Attributes:
        models: Models at rest.
        checkpoints: Checkpoints in the catalogue.
        owners: Tenants who have them.
        calls_kept: Calls of each model whose answers are kept.
        rate: Small calls in a second.
        seconds: How long they come.
        turn_ms: What a turn of the ranks takes where tenants share them.
        kept: Folder in which populations of checkpoints stay, as they were written, for another
            run; empty: none does.
        points_from: The smallest point of a row that is measured.
        only_populate: Write populations of checkpoints, and measure nothing on them.
    """

    models: int = 10_000
    checkpoints: int = 1_000_000
    owners: int = 1000
    calls_kept: int = 64
    rate: int = 500
    seconds: float = 60.0
    turn_ms: float = 20.0
    kept: str = ""
    points_from: int = 0
    only_populate: int = 0

    def points(self, most: int) -> Sequence[int]:
        """Three of a row: a hundredth, a tenth and the whole."""
        return [n for n in (most // 100, most // 10, most) if n >= self.points_from]
