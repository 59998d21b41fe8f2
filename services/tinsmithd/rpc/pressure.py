"""Ends reads that stand in the middle of a message while the process grows by too much.

grpc's core holds the bytes of a message until all of it is there, and does not say how many they
are: hundreds of half messages would be gigabytes that nobody has counted. What they hold came
within `stream_stall_s`, for then they are ended anyway; so they hold no more than what the process
grew by in that time, beyond the bytes of calls that it took in. Where that is more than
`received_bytes_max`, and reads that have waited for longer than `READ_S` are so many that they can
be why, those are ended, and their callers told to come again. Growth that has another cause may so
cost callers that are slow in sending one more attempt.
"""

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path

INTERVAL_S = 0.05
READ_S = 0.1
"""A read for longer than this waits for a peer that is slow, silent or stopped on purpose."""
_STATM = Path("/proc/self/statm")


def rss_bytes() -> int:
    """Memory of this process; 0 where the system does not say."""
    try:
        return int(_STATM.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


class Pressure:
    """Watches the reads of one server; `run` until cancelled.

    Args:
        bytes_max: The process may grow by so much.
        window_s: In so long.
        message_bytes_max: Most bytes that a read can stand for.
    """

    def __init__(self, bytes_max: int, window_s: float, message_bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._message_bytes_max = message_bytes_max
        self._kept_bytes = 0
        self._reading: dict[object, tuple[float, Callable[[], None]]] = {}
        self._samples: deque[int] = deque(maxlen=max(1, int(window_s / INTERVAL_S)))

    def began(self, reader: object, now_s: float, end: Callable[[], None]) -> None:
        """A read has begun; `end` ends it from outside."""
        self._reading[reader] = (now_s, end)

    def ended(self, reader: object) -> None:
        """It has a message, or none comes."""
        self._reading.pop(reader, None)

    def kept(self, nbytes: int) -> None:
        """So many bytes of a complete call stay: the process grew by them for a good reason."""
        self._kept_bytes += nbytes

    async def run(self) -> None:
        """Look, now and then."""
        loop = asyncio.get_running_loop()
        while True:
            self._look(loop.time())
            await asyncio.sleep(INTERVAL_S)

    def _look(self, now_s: float) -> None:
        self._samples.append(rss_bytes() - self._kept_bytes)
        if self._samples[-1] - min(self._samples) <= self._bytes_max:
            return
        due = [(r, end) for r, (since, end) in self._reading.items() if now_s - since > READ_S]
        if len(due) * self._message_bytes_max < self._bytes_max:
            return
        for reader, end in due:
            self.ended(reader)
            with contextlib.suppress(RuntimeError):  # its call ends already
                end()
