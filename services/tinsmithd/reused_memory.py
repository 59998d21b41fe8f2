"""Memory for what is large, made again and again, and as large each time: copies of states.

To a process new memory costs a fault for each page, and the faults of one thread wait for those of
another: copies of 59 MB and of 20 MB took 80 and 115 ms so, and take 14 to 20 and 6 to 8 in memory
that is there.
"""

import contextlib
import threading
import weakref

import numpy as np

TOUCHED_BYTES = 1024 * 1024
"""Of what is made ready at once: other threads of the process have their turns in between."""


class ReusedMemory:
    """Gives memory, and gives it again once nobody has any more of it. Any thread may use it.

    Args:
        bytes_max: Most that is kept for others; what is larger is always new, and never kept.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        # What nobody has comes back wherever the interpreter finds that out, also in here.
        self._lock = threading.RLock()
        self._kept: list[np.ndarray] = []

    @property
    def kept_bytes(self) -> int:
        """Bytes that nobody has."""
        return sum(each.nbytes for each in self._kept)

    def take(self, nbytes: int) -> np.ndarray:
        """So many bytes, uint8, of any content; to be kept as long as it, or a view of it, is."""
        memory = self._found(nbytes)
        if memory is None:
            memory = np.empty(nbytes, np.uint8)
        # A view of an array has that array's own base, if that is an array: what is lent here has
        # another one, so that it lives as long as its views.
        lent = np.frombuffer(memory.data, np.uint8)
        weakref.finalize(lent, self._keep, memory).atexit = False
        return lent

    def prepare(self, nbytes: int, count: int) -> threading.Thread | None:
        """Have memory made beside all else, so that `count` can be taken of so many bytes each.

        Returns:
            Who makes it; None where it is there, or more than may be kept.
        """
        with self._lock:
            missing = count - sum(each.nbytes == nbytes for each in self._kept)
            if missing <= 0 or missing * nbytes + self.kept_bytes > self._bytes_max:
                return None
        making = threading.Thread(
            target=self._make, args=(nbytes, missing), name="memory", daemon=True
        )
        try:
            making.start()
        except RuntimeError:  # no thread is to be had: it is made when it is asked for
            return None
        return making

    def _make(self, nbytes: int, count: int) -> None:
        with contextlib.suppress(MemoryError):
            for _ in range(count):
                memory = np.empty(nbytes, np.uint8)
                for start in range(0, nbytes, TOUCHED_BYTES):
                    memory[start : start + TOUCHED_BYTES] = 0
                self._keep(memory)

    def _found(self, nbytes: int) -> np.ndarray | None:
        with self._lock:
            kept, self._kept = self._kept, []
            fits = next((i for i, each in enumerate(kept) if each.nbytes == nbytes), None)
            found = None if fits is None else kept.pop(fits)
            self._kept = kept + self._kept
        return found

    def _keep(self, memory: np.ndarray) -> None:
        with self._lock:
            self._kept.append(memory)
            # What was of use longest ago leaves.
            while self._kept and self.kept_bytes > self._bytes_max:
                self._kept.pop(0)
