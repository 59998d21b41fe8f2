"""Runs whole clusters for tests: real processes, production wiring, free ports."""

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

import ports
import programs
from tinsmithd.up import SERVICES, EmbeddedCluster, Options

START_S_MAX = 100.0


def children(pid: int) -> Sequence[int]:
    """Process ids of a process's children, in the order in which they were started."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # a thread that has ended
            found += map(int, (task / "children").read_text().split())
    return sorted(found)


def rank_groups(training_pid: int) -> Sequence[int]:
    """Process ids of a Training server's rank groups, whatever template they were forked from."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            command = (folder / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
            if command[-1] == f"--live-with-pid={training_pid}".encode():
                found.append(int(folder.name))
    return sorted(found)


def until_health(address: str, *, serving: bool, service: str = SERVICES["training"]) -> None:
    """Wait until a server says of its service that it serves, or that it does not."""
    wanted = health_pb2.HealthCheckResponse.SERVING
    if not serving:
        wanted = health_pb2.HealthCheckResponse.NOT_SERVING
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while True:
            with contextlib.suppress(grpc.RpcError):
                asked = health_pb2.HealthCheckRequest(service=service)
                if stub.Check(asked, timeout=5).status == wanted:
                    return
            time.sleep(0.05)


@contextlib.contextmanager
def until_back(address: str, *, service: str = SERVICES["training"]) -> Iterator[None]:
    """After the body of the `with`, wait until a server that served said of its service that it
    does not, and then that it serves again: it may say the first for a moment only."""
    states = health_pb2.HealthCheckResponse
    with grpc.insecure_channel(address) as channel:
        watching = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=service), wait_for_ready=True
        )
        assert next(watching).status == states.SERVING
        yield
        for wanted in (states.NOT_SERVING, states.SERVING):
            while next(watching).status != wanted:
                pass


def until_gone(pids: Sequence[int]) -> None:
    """Wait until none of these processes is left, not even a stopped one."""
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.05)


def free_ports() -> int:
    """The first of three free ports that follow each other."""
    return ports.take(3)


class RunningCluster:
    """A cluster that runs until `stop`; a context manager.

    Args:
        base_model: Folder of the base model.
        data: Where it keeps everything.
        engine: As in `tinsmith up`.
        ranks: As in `tinsmith up`.
        port: Training's; the others have the next two. 0 takes free ones.
        keep: Start again what dies, as `tinsmith up` does.
        threads: Of each process that computes.
        dtype: As in `tinsmith up`.
        keys_file: As in `tinsmith up`.
        gateway_port: As in `tinsmith up`; None starts no gateway.
        tls: Whether they speak TLS.

    Attributes:
        address: Training's `host:port`.
        addresses: Each server's `host:port`, by its name.
        gateway_url: `http://host:port` of the gateway; None where there is none.
        base_model: Name of its base model.
        ca_file: Its authority, where it speaks TLS; else None.
    """

    def __init__(
        self,
        base_model: Path,
        data: Path,
        *,
        engine: str = "deepspeed",
        ranks: int = 1,
        port: int = 0,
        keep: bool = False,
        threads: int = 1,
        dtype: str = "float32",
        keys_file: Path | None = None,
        gateway_port: int | None = None,
        tls: bool = False,
    ) -> None:
        programs.share_template()
        options = Options(
            base_model=str(base_model),
            data=data,
            port=port,
            engine=engine,
            ranks=ranks,
            threads=threads,
            dtype=dtype,
            keys_file=keys_file,
            gateway_port=gateway_port,
            tls=tls,
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._cluster = EmbeddedCluster(options, keep=keep)
        self.logs = data / "logs"
        self.base_model = base_model.name
        try:
            self._run(self._cluster.__aenter__())
        except BaseException as error:
            self._loop.call_soon_threadsafe(self._loop.stop)
            for log in sorted(self.logs.glob("*.log")):
                error.add_note(f"--- {log.name}\n{log.read_text()[-3000:]}")
            raise
        self.address = self._cluster.address
        self.addresses = self._cluster.addresses
        self.gateway_url = self._cluster.gateway_url
        self.ca_file = None if self._cluster.tls is None else self._cluster.tls.ca_file

    def _run(self, coroutine: object) -> object:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)  # type: ignore[arg-type]
        return future.result(START_S_MAX)

    def pid(self, name: str) -> int:
        """Process id of a server; of one that died and is not started again yet, the old one."""
        return self._cluster.pid(name)

    def rank_pids(self) -> Sequence[int]:
        """Process ids of the ranks, by rank: where there are several, a child's children. None
        while the rank group is not there."""
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            for group in rank_groups(self.pid("training")):
                return children(group) or [group]
        return []

    def kill(self) -> None:
        """End every server with SIGKILL; the ranks follow their server."""
        for name in self.addresses:
            os.kill(self.pid(name), 9)
        self.stop()

    def stop(self) -> None:
        """Stop gracefully."""
        if self._loop.is_running():
            self._run(self._cluster.stop())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def __enter__(self) -> "RunningCluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
