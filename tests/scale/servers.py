"""Server processes with a population, and what they take of the machine."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import grpc
import psutil

import programs
from faults.processes import Process
from tinsmith import v1 as pb
from tinsmith.keys import AUTHORIZATION, SCHEME
from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub
from tinsmith.v1.training_service_pb2_grpc import TrainingServiceStub
from tinsmithd.keys import KeyFile, Scope

MIB = 1024 * 1024
RATE_S = 0.2


class Keys:
    """A file of keys: an administrator, the cluster's servers, and some tenants.

    Attributes:
        path: The file.
        admin: The administrator's key.
        tenants: Key by tenant.
    """

    def __init__(self, folder: Path, *tenants: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "keys.json"
        keys = KeyFile(self.path)
        self.admin = keys.create("boss", Scope.ADMIN).text
        self.server_file = folder / "server.key"
        self.server_file.write_text(keys.create("", Scope.SERVER).text)
        self.tenants = {tenant: keys.create(tenant).text for tenant in tenants}


class Server:
    """One process, and a stub of its service; a context manager that kills it.

    Args:
        kind: `training` or `checkpoint`.
        folder: Logs and data.
        keys: Who may call.
        settings: Its settings.

    Attributes:
        start_s: From the start of the process until it answered.
    """

    def __init__(self, kind: str, folder: Path, keys: Keys, **settings: object) -> None:
        every: dict[str, object] = {
            "data_folder": folder / "data",
            "keys_file": keys.path,
            "log_level": "WARNING",
            **settings,
        }
        if kind == "training":
            every["cluster_key_file"] = keys.server_file
        self._keys = keys
        self.folder = folder
        begun_s = time.perf_counter()
        self.process = Process(kind, folder, every)
        self.address = f"127.0.0.1:{self.process.port}"
        self._channel = grpc.insecure_channel(self.address)
        stub_type = TrainingServiceStub if kind == "training" else CheckpointServiceStub
        self.stub: Any = stub_type(self._channel)
        request: Any = pb.GetCapabilitiesRequest()
        if kind == "checkpoint":
            request = pb.CheckpointServiceGetCapabilitiesRequest()
        self.stub.GetCapabilities(request, metadata=self.shown(), wait_for_ready=True, timeout=300)
        self.start_s = time.perf_counter() - begun_s
        self.watched = psutil.Process(self.process.pid)

    def shown(self, tenant: str = "") -> tuple[tuple[str, str], ...]:
        """Metadata of a tenant, or of the administrator."""
        key = self._keys.tenants[tenant] if tenant else self._keys.admin
        return ((AUTHORIZATION, f"{SCHEME} {key}"),)

    @property
    def memory_mib(self) -> float:
        """What of its memory is in RAM."""
        return float(self.watched.memory_info().rss / MIB)

    @property
    def cpu_s(self) -> float:
        """Processor time so far."""
        used = self.watched.cpu_times()
        return float(used.user + used.system)

    def share_in(self, seconds: float) -> float:
        """Share of a processor that it has during so many seconds from now, in percent."""
        before_s = self.cpu_s
        time.sleep(seconds)
        return (self.cpu_s - before_s) / seconds * 100

    def times_ms(self, method: str, requests: Iterator[Any], tenant: str = "") -> list[float]:
        """What calls take, one after the other."""
        call = getattr(self.stub, method)
        metadata, found = self.shown(tenant), []
        for request in requests:
            begun_s = time.perf_counter()
            call(request, metadata=metadata)
            found.append((time.perf_counter() - begun_s) * 1e3)
        return found

    def times_while(
        self, goes_on: Callable[[], bool], method: str, request: Any, tenant: str = ""
    ) -> list[float]:
        """What calls take, one every moment, while something goes on."""
        found = []
        while goes_on():
            found += self.times_ms(method, iter([request]), tenant)
            time.sleep(0.005)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        self.process.kill()


@contextlib.contextmanager
def idle_ranks(server: Server, turn_ms: float = 0.0) -> Iterator[None]:
    """A rank group that computes nothing, at work for the body of the `with`."""
    target = f"127.0.0.1:{server.process.link_port}"
    secret = str(server.folder / "data" / "link.secret")
    arguments = (target, secret, str(turn_ms))
    with programs.Logged(server.folder / "ranks.log", "scale.engine", *arguments) as ranks:
        request = pb.GetCapabilitiesRequest()
        ranks.until(
            lambda: server.stub.GetCapabilities(request, metadata=server.shown()).base_models
        )
        yield


def nbytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
