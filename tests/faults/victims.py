"""What can die, how it is killed, and when it is back."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from clusters import RunningCluster, children, rank_groups
from tinsmithd.failpoints import NAMES
from tinsmithd.up import SERVICES

RANK_POINTS = tuple(name for name in NAMES if name.startswith(("mid_", "pre_optim", "post_optim")))
TRAINING_POINTS = NAMES[: NAMES.index("restore_mid") + 1]
CHECKPOINT_POINTS = tuple(name for name in NAMES if name.startswith("ckpt_"))
LATEST: Mapping[str, int] = {
    **dict.fromkeys(TRAINING_POINTS, 20),
    **dict.fromkeys(RANK_POINTS, 12),
    **dict.fromkeys(("snapshot_mid_write", "snapshot_pre_rename", "snapshot_post_rename"), 2),
    **{"mid_forward": 2, "restore_mid": 1, "post_optim_pre_ack": 6, "mid_optim": 6, "pre_optim": 6},
}
"""A failpoint acts when it is reached for the n-th time, n from 1 to this."""

RANK, GROUP, ALL = "one rank", "rank group", "all at once"
BACK_S_MAX = 120.0
SETTLE_S = 0.5
"""Health is looked after at intervals: so long may it still speak of the time before."""
HEALTH = (*SERVICES.items(), ("training", f"{SERVICES['training']}/recovery"))
"""What must serve; the last one says that the ranks have all models again."""


def kind_of(point: str) -> str:
    """The kind of process that reaches a failpoint."""
    if point in CHECKPOINT_POINTS:
        return "checkpoint"
    return "trainer" if point in RANK_POINTS else "training"


class NotBack(Exception):
    """Something that was killed did not come back in time."""


class Victims:
    """The processes of one cluster that keeps itself running.

    Args:
        cluster: It must start again what dies.
        once: Folder of `once/sitecustomize.py`'s failpoints.
    """

    def __init__(self, cluster: RunningCluster, once: Path) -> None:
        self._cluster = cluster
        self._once = once
        self._channels = {
            name: grpc.insecure_channel(address, options=[("grpc.max_reconnect_backoff_ms", 500)])
            for name, address in cluster.addresses.items()
        }

    def close(self) -> None:
        """Close the connections."""
        for channel in self._channels.values():
            channel.close()

    def group(self) -> Sequence[int]:
        """The ranks, and their parent where there are several."""
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            launched = rank_groups(self._cluster.pid("training"))
            return [*launched, *(pid for parent in launched for pid in children(parent))]
        return []

    def pids(self, victim: str, rng: random.Random) -> list[int]:
        """Which processes die with a victim of this kind; none when it is not there just now."""
        if victim == RANK:
            ranks = self._cluster.rank_pids()
            return [rng.choice(ranks)] if ranks else []
        if victim == GROUP:
            return list(self.group())
        names = list(SERVICES) if victim == ALL else [victim]
        pids = [self._cluster.pid(name) for name in names]
        return [*pids, *self.group()] if victim == ALL else pids

    def kill(self, victim: str, rng: random.Random) -> list[int]:
        """SIGKILL; returns who died of it, which may be nobody."""
        killed = []
        for pid in self.pids(victim, rng):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
        return killed

    def kill_process(self, kind: str) -> list[int]:
        """SIGKILL to who must start anew so that a process of this kind takes a failpoint."""
        return self.kill(GROUP if kind == "trainer" else kind, random.Random(0))

    def arm(self, point: str, at: int) -> str:
        """Give the next process of the right kind a failpoint; returns the kind."""
        kind = kind_of(point)
        (self._once / f"{kind}.claimed").unlink(missing_ok=True)
        part = self._once / f"{kind}.part"
        part.write_text(f"{point}:kill@{at}")
        part.rename(self._once / kind)
        return kind

    def disarm(self) -> None:
        """Take back what nobody claimed."""
        for file in self._once.iterdir():
            file.unlink(missing_ok=True)  # a process that starts just now may take it away

    def armed_pid(self, kind: str) -> int | None:
        """Who has the failpoint; None while it is not claimed yet."""
        claimed = self._once / f"{kind}.claimed"
        return int(claimed.read_text()) if claimed.exists() else None

    def serving(self) -> bool:
        """True while every server says so, and no model is still being brought back."""
        for name, service in HEALTH:
            stub = health_pb2_grpc.HealthStub(self._channels[name])
            request = health_pb2.HealthCheckRequest(service=service)
            try:
                status = stub.Check(request, timeout=5).status
            except grpc.RpcError:
                return False
            if status != health_pb2.HealthCheckResponse.SERVING:
                return False
        return True

    def until_back(self, dead: Sequence[int]) -> float:
        """Wait until nobody of the dead is looked at any more and all serve; returns when.

        Raises:
            NotBack: It took longer than `BACK_S_MAX`.
        """
        time.sleep(SETTLE_S)
        wait_until(lambda: not set(dead) & {*self._servers(), *self.group()} and bool(self.group()))
        wait_until(self.serving)
        return time.monotonic()

    def _servers(self) -> Sequence[int]:
        return [self._cluster.pid(name) for name in SERVICES]


def alive(pid: int) -> bool:
    """True for a process that runs; a zombie does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def wait_until(done: Callable[[], bool], most_s: float = BACK_S_MAX) -> None:
    """Poll.

    Raises:
        NotBack: In vain.
    """
    give_up_s = time.monotonic() + most_s
    while not done():
        if time.monotonic() > give_up_s:
            raise NotBack(f"waited {most_s:g} s")
        time.sleep(0.02)
