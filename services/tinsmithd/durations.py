"""How long things took: counts by bounds, as a histogram of metrics has them; plain numbers."""

import bisect
import itertools
from collections.abc import Sequence

BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Durations:
    """Durations, each counted under the least bound that it is within.

    Args:
        bounds_s: The bounds, rising, seconds.

    Attributes:
        sum_s: All of them together.
    """

    def __init__(self, bounds_s: Sequence[float] = BOUNDS_S) -> None:
        self._bounds_s = bounds_s
        self._counts = [0] * (len(bounds_s) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self._counts[bisect.bisect_left(self._bounds_s, seconds)] += 1
        self.sum_s += seconds

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self._counts)

    def buckets(self) -> Sequence[tuple[str, float]]:
        """Bound and number of those within it, the last one for all; another thread may ask."""
        bounds = [*map(str, self._bounds_s), "+Inf"]
        return list(zip(bounds, map(float, itertools.accumulate(list(self._counts))), strict=True))
