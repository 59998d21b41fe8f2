"""Whether the ranks of a group get on with their command, or only live.

A rank that waits in a collective beats on, and so does one that computes without end: the heartbeat
finds neither. So every beat carries what its rank got done, and each rank ends its process when no
rank of the group gets on. It asks for progress of any of them, since one may rightly wait for
another for as long as a call takes. How long is too long depends on what was seen: a machine and a
model for which a step takes minutes are no fault.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tinsmithd.text import bounded

FACTOR = 10
"""Silence is too long when it is so many times the longest that ended by itself."""
INTERVAL_S_MAX = 2.0
LOOKS_PER_TIMEOUT = 6
DOING_BYTES_MAX = 100
_NUMBERS = 6
"""That a beat begins with."""


@dataclass(frozen=True)
class Memory:
    """Of one rank; 0 where nobody knows.

    Attributes:
        resident_bytes: Of the machine's memory.
        device_bytes: Of its GPU's memory: what torch has taken, whether tensors fill it or not.
        device_size_bytes: All memory of that GPU.
    """

    resident_bytes: int = 0
    device_bytes: int = 0
    device_size_bytes: int = 0


@dataclass(frozen=True)
class Report:
    """What one rank says of its progress.

    Attributes:
        count: See `trainer.progress.Progress`.
        collectives: Collectives that it has entered.
        doing: The command under way; empty while it waits for one.
        ends: It found that the ranks get nothing done, and ends.
        memory: What it has of memory.
    """

    count: int = 0
    collectives: int = 0
    doing: str = ""
    ends: bool = False
    memory: Memory = Memory()

    def encode(self) -> str:
        """As a beat carries it."""
        memory = self.memory
        taken = f"{memory.resident_bytes} {memory.device_bytes} {memory.device_size_bytes}"
        return f"{self.count} {self.collectives} {int(self.ends)} {taken} {self.doing}"

    @classmethod
    def decode(cls, text: str) -> "Report":
        """What another rank said; of one that has not said anything, nothing."""
        *numbers, doing = text.split(" ", _NUMBERS)
        if len(numbers) < _NUMBERS or not all(map(str.isdecimal, numbers)):
            return cls()
        count, collectives, ends, *memory = map(int, numbers)
        doing = bounded(doing, DOING_BYTES_MAX)
        return cls(count, collectives, doing, ends == 1, Memory(*memory))


Reports = Mapping[int, Report]
"""By rank."""


class StallRule:
    """How long the ranks may get nothing done.

    Args:
        least_s: Always so long.

    Attributes:
        longest_s: The longest silence that ended by itself.
    """

    def __init__(self, least_s: float) -> None:
        self._least_s = least_s
        self._done: Mapping[int, tuple[int, int]] = {}
        self._busy = False
        self._since_s = 0.0
        self.longest_s = 0.0

    def too_long_s(self, now_s: float, said: Reports) -> float | None:
        """Look at what the ranks say; returns for how long nothing was done, if too long.

        It is too long, too, when another rank found so: it may have looked closer.

        Args:
            now_s: Time, of a clock that stands still while this process does.
            said: What each rank says.
        """
        silence_s = now_s - self._since_s
        done = {rank: (report.count, report.collectives) for rank, report in said.items()}
        was_busy, self._busy = self._busy, any(report.doing for report in said.values())
        if done != self._done:
            if was_busy:
                self.longest_s = max(self.longest_s, silence_s)
            self._done, self._since_s = done, now_s
        elif not self._busy:
            self._since_s = now_s
        elif silence_s > max(self._least_s, FACTOR * self.longest_s) or any(
            report.ends for report in said.values()
        ):
            return silence_s
        return None


class AwakeClock:
    """Seconds that this process ran: one that is suspended (a laptop, a debugger) finds the world
    as it left it.

    Args:
        step_s_max: Between two readings at most so much passes.
    """

    def __init__(self, step_s_max: float) -> None:
        self._step_s_max = step_s_max
        self._last_s = time.monotonic()
        self._awake_s = 0.0

    def read(self) -> float:
        """The seconds so far; one thread asks, regularly."""
        now_s = time.monotonic()
        self._awake_s += min(now_s - self._last_s, self._step_s_max)
        self._last_s = now_s
        return self._awake_s


class StallWatch:
    """A thread that calls `on_stall`, once, when the ranks get nothing done for too long.

    Args:
        reports: What all ranks of the group say.
        timeout_s: See `StallRule`.
        on_stall: Takes what to tell a person; it ends the process.

    Attributes:
        interval_s: Seconds between two looks.
    """

    def __init__(
        self, reports: Callable[[], Reports], *, timeout_s: float, on_stall: Callable[[str], None]
    ) -> None:
        self.interval_s = min(INTERVAL_S_MAX, timeout_s / LOOKS_PER_TIMEOUT)
        self._reports = reports
        self._rule = StallRule(timeout_s)
        self._on_stall = on_stall
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stall", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()

    def _run(self) -> None:
        clock = AwakeClock(2 * self.interval_s)
        while not self._closed.wait(self.interval_s):
            said = self._reports()
            silence_s = self._rule.too_long_s(clock.read(), said)
            if silence_s is not None:
                self._on_stall(_message(silence_s, said))
                return


def _message(silence_s: float, said: Reports) -> str:
    ranks = [
        f"rank {rank}: {report.doing or 'waits for a command'}, {report.collectives} collectives"
        for rank, report in sorted(said.items())
    ]
    return f"nothing was done for {silence_s:.0f} s ({'; '.join(ranks)})"
