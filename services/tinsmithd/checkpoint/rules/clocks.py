"""The clocks by which checkpoints and leases end."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Clocks:
    """Two clocks, seconds.

    Attributes:
        wall: Since 1970: what times to live count in.
        monotonic: One that nobody sets: what leases and the grace of expired checkpoints count in.
    """

    wall: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic


REAL_CLOCKS = Clocks()
"""Those of this machine."""
