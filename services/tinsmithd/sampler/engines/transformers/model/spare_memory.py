"""Memory for the next adapter that this process has already.

To a process new memory costs a fault for each page; where the machine is virtual its host may have
to find the page as well, and 20 MB took 50 to 100 ms. The next adapter is mostly as large as the
last one, so memory for it is made ready when there is time.
"""

import threading

import numpy as np

SPARE_BYTES_MAX = 64 * 1024 * 1024
"""No more is kept ready: as large as what a Sampler brings in ahead, by default."""
ALIGNED_FLOATS = 16
"""A cache line."""
TOUCHED_FLOATS = 256 * 1024
"""Of what is made ready at once: whoever waits for that waits for some milliseconds at most."""


class SpareMemory:
    """Zeros, float32; any thread may take them, or make them ready."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next: np.ndarray | None = None
        self._touched = 0

    def take(self, count: int) -> np.ndarray:
        """So many zeros, which begin with a cache line; as many are to be made ready again."""
        with self._lock:
            taken, self._next = self._next, None
            room = count + ALIGNED_FLOATS
            if taken is None or len(taken) != room:
                taken = np.zeros(room, np.float32)
            if taken.nbytes <= SPARE_BYTES_MAX:
                # So far this is only an address: the pages come as they are touched.
                self._next, self._touched = np.zeros(room, np.float32), 0
        first = -taken.ctypes.data // taken.itemsize % ALIGNED_FLOATS
        return taken[first : first + count]

    def touch_some(self) -> bool:
        """Make some of the next memory ready; returns whether there is more to do."""
        with self._lock:
            if self._next is None or self._touched >= len(self._next):
                return False
            end = self._touched + TOUCHED_FLOATS
            self._next[self._touched : end] = 0
            self._touched = end
            return True
