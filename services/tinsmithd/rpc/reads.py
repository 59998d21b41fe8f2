"""Watches the reads of a server's calls, and ends those that stand still.

A read that has waited for `stream_stall_s` is ended: its peer sends nothing, or too slowly.

Others are ended earlier while the process grows by too much. grpc's core holds the bytes of a
message until all of it is there, and does not say how many they are: hundreds of half messages
would be gigabytes that nobody has counted. What they hold came within `stream_stall_s`; so they
hold no more than what the process grew by in that time, beyond the bytes of calls that it took in.
Where that is more than `received_bytes_max`, and reads that have waited for longer than `READ_S`
are so many that they can be why, those are ended, and their callers told to come again. Growth
that has another cause may so cost callers that are slow in sending one more attempt.
"""

import asyncio
import functools
import os
import time
from collections import deque
from typing import Protocol

INTERVAL_S = 0.02
READ_S = 0.05
"""A read for longer than this waits for a peer that is slow, silent or stopped on purpose.

Peers on the same machine send over 1 GB/s, which nobody counts until `READ_S` and `INTERVAL_S` have
passed: 100 half messages took 165 MiB beyond the limit at 0.1 and 0.05 s, and 90 with these."""


class Reader(Protocol):
    """Whoever reads one message."""

    def stalled(self) -> None:
        """End it: nothing has come for too long."""

    def squeezed(self) -> None:
        """End it: there is no room for more."""


@functools.cache
def _statm() -> int | None:
    """A file descriptor that stays open, since it is read fifty times a second."""
    try:
        return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


os.register_at_fork(after_in_child=_statm.cache_clear)  # a child has numbers of its own


def rss_bytes() -> int:
    """Memory of this process; 0 where the system does not say."""
    statm = _statm()
    if statm is None:
        return 0
    return int(os.pread(statm, 128, 0).split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Reads:
    """The reads under way of one server; `run` until cancelled.

    Args:
        stall_s: Maximum time of a read, seconds.
        growth_bytes_max: Maximum number of bytes that the process may grow by in that time.
        message_bytes_max: Maximum number of bytes that one read can hold.
    """

    def __init__(self, stall_s: float, growth_bytes_max: int, message_bytes_max: int) -> None:
        self._stall_s = stall_s
        self._growth_bytes_max = growth_bytes_max
        self._message_bytes_max = message_bytes_max
        self._since_s: dict[Reader, float] = {}  # the oldest first
        self._sizes: deque[int] = deque(maxlen=max(1, round(stall_s / INTERVAL_S)))
        self._kept_bytes = 0

    def began(self, reader: Reader) -> None:
        """A read has begun."""
        self._since_s[reader] = time.monotonic()

    def ended(self, reader: Reader) -> None:
        """It has a message, or none comes."""
        self._since_s.pop(reader, None)

    def kept(self, nbytes: int) -> None:
        """Note that bytes of a complete call stay: the process grew by them for a good reason."""
        self._kept_bytes += nbytes

    async def run(self) -> None:
        """Look, now and then."""
        while True:
            self.look(time.monotonic())
            await asyncio.sleep(INTERVAL_S)

    def look(self, now_s: float) -> None:
        """End what is due."""
        for reader in self._older_than(self._stall_s, now_s):
            self.ended(reader)
            reader.stalled()
        self._sizes.append(rss_bytes() - self._kept_bytes)
        due = self._older_than(READ_S, now_s)
        if len(due) * self._message_bytes_max < self._growth_bytes_max:
            return
        if self._sizes[-1] - min(self._sizes) <= self._growth_bytes_max:
            return
        for reader in due:
            self.ended(reader)
            reader.squeezed()

    def _older_than(self, seconds: float, now_s: float) -> list[Reader]:
        due = []
        for reader, since_s in self._since_s.items():
            if now_s - since_s < seconds:
                break
            due.append(reader)
        return due
