"""Asks a server for its health again and again, each time on a new connection, as a kubelet does.

`python -m attack.prober PID ADDRESS` prints one line for each answer until its standard input ends:
the seconds that it took, and how many of them the server's event loop or this process was ready to
run and had no core, or had one that was taken from this machine. A process of its own: what the
attack itself computes must not be measured.
"""

import contextlib
import os
import select
import sys
import time
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

INTERVAL_S = 0.03
TIMEOUT_S = 30.0
OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]


def waits_s(process: int, *, whole: bool) -> dict[str, float]:
    """Seconds that threads of a process were ready to run and had no core, by their ids: its main
    thread, or all."""
    waits = {}
    for task in Path(f"/proc/{process}/task").iterdir():
        if whole or task.name == str(process):
            with contextlib.suppress(OSError):  # a thread that has just ended
                waits[task.name] = int((task / "schedstat").read_text().split()[1]) / 1e9
    return waits


def stolen_s() -> float:
    """Seconds for which cores of this machine, if it is a virtual one, were somebody else's."""
    return int(Path("/proc/stat").read_text().split(maxsplit=9)[8]) / os.sysconf("SC_CLK_TCK")


def probe(pid: int, address: str) -> None:
    """Ask once and say how long it took; a failure is said as its code in place of the seconds."""
    before_s = waits_s(pid, whole=False) | waits_s(os.getpid(), whole=True)
    stolen_before_s, begun_s = stolen_s(), time.monotonic()
    with grpc.insecure_channel(address, options=OPTIONS) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            print(error.code().name, 0.0, flush=True)
            return
    took_s = time.monotonic() - begun_s
    after_s = waits_s(pid, whole=False) | waits_s(os.getpid(), whole=True)
    # By thread: one that has ended took what it had waited with it, and is not counted.
    waited_s = sum(seconds - before_s.get(task, 0.0) for task, seconds in after_s.items())
    waited_s += stolen_s() - stolen_before_s
    print(f"{took_s:.4f} {waited_s:.4f}", flush=True)


def main() -> None:
    pid, address = int(sys.argv[1]), sys.argv[2]
    while not select.select([sys.stdin], [], [], INTERVAL_S)[0]:
        try:
            probe(pid, address)
        except FileNotFoundError:  # the server has ended, which others notice
            return


if __name__ == "__main__":
    main()
