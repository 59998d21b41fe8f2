"""Runs in a pod of the ranks: prints the ranks' processes as JSON, and kills one of them.

Argument `kill` ends the first of them with SIGKILL. Ranks are what the pod's processes started
last: a keeper starts a template, which forks a starter, which forks the ranks.
"""

import json
import os
import sys
import time
from pathlib import Path


def parents() -> dict[int, int]:
    """Each process and who started it."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        found[int(folder.name)] = int(fields[1])
    return found


def age_s(pid: int) -> float:
    """Seconds since a process started."""
    started = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


def ranks() -> list[int]:
    """Process ids of the ranks."""
    found = parents()

    def depth(pid: int) -> int:
        return 0 if pid not in found else 1 + depth(found[pid])

    under_first = [pid for pid in found if pid != 1 and depth(pid) > 1]
    deepest = max((depth(pid) for pid in under_first), default=0)
    return sorted(pid for pid in under_first if depth(pid) == deepest)


if __name__ == "__main__":
    pids = ranks()
    now_s = time.time()
    print(json.dumps({str(pid): now_s - age_s(pid) for pid in pids}))
    if sys.argv[1:] == ["kill"]:
        os.kill(pids[0], 9)
