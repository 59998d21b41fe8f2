"""CPU time of processes."""

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path


def cpu_clock(pids: Sequence[int], *, own: bool = True) -> Callable[[], float]:
    """CPU seconds so far of some processes, and of this one too where it is a part of the side."""

    def clock() -> float:
        others_ns = 0
        for task in (task for pid in pids for task in Path(f"/proc/{pid}/task").iterdir()):
            with contextlib.suppress(OSError):  # a thread that has just ended
                # Unlike the times in `stat`, these are finer than a clock tick.
                others_ns += int((task / "schedstat").read_text().split()[0])
        return (time.process_time() if own else 0.0) + others_ns / 1e9

    return clock
