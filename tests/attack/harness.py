"""Watches servers while they are attacked: health, memory, what they say, and that they live.

    with watching(targets_of(cluster)) as watch:
        ...                        # the attack; `watch.answered(code)` counts what came back

At the end the test fails where a server died, its health took longer than `HEALTH_S_MAX` at any
time, it grew by more than `RSS_GROWTH_BYTES_MAX`, or an answer or a log speaks of a fault of its
own. The bounds are those of the project, not of a machine: see `Health.slowest_s` for what is
taken off on one that is loaded.
"""

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from clusters import RunningCluster
from faults.processes import Process

HEALTH_S_MAX = 0.5
MIB = 1024 * 1024
RSS_GROWTH_BYTES_MAX = 200 * MIB
SAMPLE_INTERVAL_S = 0.02
PROBES_MIN = 3
OWN_FAULTS = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}
"""Statuses that say that the server is to blame: no caller may be able to bring them about."""
_FAULT_LINE = re.compile(r"Traceback \(most recent|Unexpected \[|failed \[|exception was never")


@dataclass(frozen=True)
class Target:
    """One process that is attacked.

    Attributes:
        name: For messages.
        pid: Says its process id now.
        address: Where it serves health; empty for a rank.
        log: What it writes; None where somebody else's log has it.
    """

    name: str
    pid: Callable[[], int]
    address: str = ""
    log: Path | None = None


def targets_of(cluster: RunningCluster) -> list[Target]:
    """Every server of a cluster, and its ranks."""
    servers = [
        Target(name, lambda name=name: cluster.pid(name), address, cluster.logs / f"{name}.log")
        for name, address in cluster.addresses.items()
    ]
    ranks = [
        Target(f"rank {index}", lambda index=index: cluster.rank_pids()[index])
        for index in range(len(cluster.rank_pids()))
    ]
    return servers + ranks


def target_of(name: str, process: Process) -> Target:
    """One server that a test started by itself."""
    return Target(name, lambda: process.pid, f"127.0.0.1:{process.port}", process.log)


@dataclass
class Health:
    """What a prober found.

    Attributes:
        took_s: Of each answer, and how much of that was waiting for a core.
        failures: Codes of checks that failed.
    """

    took_s: list[tuple[float, float]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def slowest_s(self) -> float:
        """The longest answer, less the time for which the server's event loop or the prober was
        ready to run and the machine had no core for it: on a busy machine that is anybody's."""
        return max((took - waited for took, waited in self.took_s), default=0.0)

    @property
    def slowest_raw_s(self) -> float:
        """The longest answer by the clock."""
        return max((took for took, _ in self.took_s), default=0.0)


class Prober:
    """Asks one server's health from a process of its own until `stop`."""

    def __init__(self, pid: int, address: str) -> None:
        self.health = Health()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "attack.prober", str(pid), address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        self._enough = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._enough.wait(60)
        assert self.health.took_s, self.health

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            first, waited = line.split()
            if first[0].isdigit():
                self.health.took_s.append((float(first), float(waited)))
            else:
                self.health.failures.append(first)
            if len(self.health.took_s) + len(self.health.failures) >= PROBES_MIN:
                self._enough.set()
        self._enough.set()

    def stop(self) -> Health:
        """What was found; the process has ended."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._reader.join(60)
        self._process.wait(60)
        return self.health


def rss_bytes(pid: int) -> int:
    """Memory that a process has now."""
    return _memory(pid, "VmRSS")


def _memory(pid: int, name: str) -> int:
    with contextlib.suppress(OSError):  # it has ended, which others notice
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


class Memory:
    """The most memory that a process had since construction, beyond what it had then."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        # The kernel's own high-water mark, which misses no moment, starts anew.
        Path(f"/proc/{pid}/clear_refs").write_text("5")
        self._before = rss_bytes(pid)

    @property
    def growth_bytes(self) -> int:
        """See the class."""
        return max(0, _memory(self._pid, "VmHWM") - self._before)


@dataclass
class Watch:
    """What was seen of an attack.

    Attributes:
        codes: Statuses of answers, counted by the test.
        health, growth_bytes: By target, filled in at the end.
    """

    codes: Counter[grpc.StatusCode] = field(default_factory=Counter)
    health: dict[str, Health] = field(default_factory=dict)
    growth_bytes: dict[str, int] = field(default_factory=dict)

    def answered(self, code: grpc.StatusCode) -> None:
        """Count an answer."""
        self.codes[code] += 1

    def report(self) -> str:
        """One line for people."""
        health = ", ".join(
            f"{name} {found.slowest_s:.2f} s ({found.slowest_raw_s:.2f} by the clock, "
            f"{len(found.took_s)} checks)"
            for name, found in self.health.items()
        )
        growth = ", ".join(f"{name} {n / MIB:.0f} MiB" for name, n in self.growth_bytes.items())
        codes = ", ".join(f"{code.name} {count}" for code, count in self.codes.items())
        return f"health: {health}; growth: {growth}; answers: {codes}"


@contextlib.contextmanager
def watching(
    targets: Sequence[Target],
    *,
    health_s_max: float = HEALTH_S_MAX,
) -> Iterator[Watch]:
    """Watch these processes while the body attacks them; see the module."""
    watch = Watch()
    pids = [target.pid() for target in targets]
    marks = [_size(target.log) for target in targets]
    served = [t for t in targets if t.address]
    probers = [Prober(target.pid(), target.address) for target in served]
    memory = [Memory(pid) for pid in pids]
    try:
        yield watch
    finally:
        # Before the probers end: what they find counts to the last moment of the attack.
        watch.growth_bytes = {
            target.name: meter.growth_bytes for target, meter in zip(targets, memory, strict=True)
        }
        for target, prober in zip(served, probers, strict=True):
            watch.health[target.name] = prober.stop()
        print(watch.report())
    now = [target.pid() for target in targets]
    assert now == pids, f"a process was replaced: {[t.name for t in targets]}: {pids} then {now}"
    assert all(Path(f"/proc/{pid}").exists() for pid in pids), "a process died"
    for target, mark in zip(targets, marks, strict=True):
        faults = own_faults(target.log, mark)
        assert not faults, f"{target.name}: {faults[:5]}"
    wrong = {code.name: n for code, n in watch.codes.items() if code in OWN_FAULTS}
    assert not wrong, wrong
    for name, found in watch.health.items():
        assert not found.failures, f"health of {name}: {Counter(found.failures)}"
        assert found.slowest_s <= health_s_max, f"health of {name}: {watch.report()}"
    for name, growth in watch.growth_bytes.items():
        assert growth <= RSS_GROWTH_BYTES_MAX, f"{name} grew by {growth / MIB:.0f} MiB"


def _size(log: Path | None) -> int:
    return log.stat().st_size if log is not None and log.exists() else 0


def own_faults(log: Path | None, mark: int = 0) -> list[str]:
    """Lines of a log, from a byte on, in which a server speaks of a fault of its own."""
    if log is None or not log.exists():
        return []
    if log.stat().st_size < mark:  # a new file has taken its place
        mark = 0
    with log.open("rb") as file:
        file.seek(mark)
        text = file.read().decode(errors="replace")
    return [line for line in text.splitlines() if _FAULT_LINE.search(line)]
