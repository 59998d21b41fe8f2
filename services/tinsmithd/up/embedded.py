"""A whole cluster as child processes of this one, each as it would run in a real cluster."""

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tinsmith.addresses import PLAIN, SECURE
from tinsmithd.config import GatewaySettings
from tinsmithd.files import private_folder
from tinsmithd.processes import EXIT_HOPELESS, Child, Ended, Log, describe_exit
from tinsmithd.rpc.channels import open_aio_channel
from tinsmithd.tls import Certificates, Files, ThrownAway, throw_away
from tinsmithd.up.gateway import is_ready, loadable
from tinsmithd.up.keys import cluster_key

SERVICES = {
    "training": "tinsmith.v1.TrainingService",
    "sampler": "tinsmith.v1.SamplerService",
    "checkpoint": "tinsmith.v1.CheckpointService",
}
GATEWAY = "gateway"
"""It speaks HTTP, and there need not be one."""
RESTART_DELAY_S_FIRST = 1.0
RESTART_DELAY_S_MAX = 30.0
SETTLED_S = 10.0
"""A server that lived longer than this is started again without a longer delay."""

LOUD = tuple(
    form % level
    for level in (b"WARNING", b"ERROR", b"CRITICAL")
    for form in (b" %s ", b'"level": "%s"')
)
"""What a line of a log has that a person should see, as text and as JSON."""

_log = logging.getLogger(__name__)


class UpError(Exception):
    """The cluster cannot start; the message says why."""


@dataclass(frozen=True)
class Options:
    """What to run. `port` is Training's; the Sampler has the next, Checkpoint the one after. No
    `gateway_port` means no gateway, 0 a free port."""

    base_model: str
    data: Path
    ranks: int = 1
    port: int = 50051
    dtype: str = "float32"
    engine: str = "deepspeed"
    zero_stage: int = 1
    threads: int = 0
    spare_groups: int = 0
    gateway_port: int | None = None
    durability: str = ""
    """Empty leaves it to the Training server's own settings."""
    tls: bool = False
    """All of them speak TLS, with a certificate and an authority of their own in `data`."""
    keys_file: Path | None = None
    """The keys of callers; None: they need none."""


class EmbeddedCluster:
    """All servers of a cluster as child processes; an async context manager.

    What dies is started again, from the first second on. A server that says that a restart cannot
    help ends a cluster that has not served yet; later it is tried again and again, since somebody
    may mend what is wrong, and ranks and callers wait for that.

    Args:
        options: What to run.
        show: Given each line of the servers' logs that a person should see.
        keep: False leaves dead what dies once all have served.

    Attributes:
        address: Training's, the one that a client needs: `host:port`, `https://` before it with
            TLS.

    Raises:
        KeyFileError: The file of keys cannot be used.
    """

    def __init__(
        self,
        options: Options,
        show: Callable[[bytes], None] = lambda line: None,
        *,
        keep: bool = True,
    ) -> None:
        self._options = options
        self._keep_on = keep
        self._show = show
        logs = options.data / "logs"
        private_folder(logs)
        self._tls = throw_away(options.data.resolve() / "tls") if options.tls else None
        self._cluster_key: Path | None = None
        if options.keys_file is not None:
            self._cluster_key = cluster_key(options.keys_file, options.data).resolve()
        self._children: dict[str, Child] = {}
        self._logs: list[Log] = []
        # The gateway is stopped before, and started after, those that it stands before.
        ports = {} if options.gateway_port is None else {GATEWAY: options.gateway_port}
        for offset, name in enumerate(SERVICES):
            ports[name] = options.port and options.port + offset
        for name, port in ports.items():
            log = Log(logs / f"{name}.log", lambda line, name=name: self._line(name, line))  # type: ignore[misc]
            self._logs.append(log)
            # With TLS the servers call the Checkpoint server where nobody else is let in.
            cluster = options.tls and name == "checkpoint"
            self._children[name] = Child(name, port, log, cluster=cluster)
        self._served = asyncio.Event()
        self._followers: list[asyncio.Task[None]] = []
        self._keepers: list[asyncio.Task[None]] = []

    @property
    def address(self) -> str:
        """Training's address."""
        return ("" if self._tls is None else SECURE) + self.addresses["training"]

    @property
    def tls(self) -> ThrownAway | None:
        """What they speak TLS with; None where they speak plain text."""
        return self._tls

    @property
    def addresses(self) -> Mapping[str, str]:
        """Each server's address, by its name."""
        names = [*SERVICES, *(name for name in self._children if name not in SERVICES)]
        return {name: f"127.0.0.1:{self._children[name].port}" for name in names}

    @property
    def gateway_url(self) -> str | None:
        """`http://host:port` of the gateway, `https://` with TLS; None where there is none."""
        address = self.addresses.get(GATEWAY)
        return address and f"{PLAIN if self._tls is None else SECURE}{address}"

    def pid(self, name: str) -> int:
        """Process id of a server; of one that died and is not started again yet, the old one."""
        process = self._children[name].process
        assert process is not None
        return process.pid

    def _line(self, name: str, line: bytes) -> None:
        loud = any(mark in line for mark in LOUD)
        if loud or not self._children[name].serving:
            self._show(line)

    def _certificates(self) -> Mapping[str, object]:
        """Settings of each of them: what it shows to callers, and to the others."""
        if self._tls is None:
            return {}
        made = self._tls
        every: dict[str, object] = {"cluster_tls_ca_file": made.ca_file}
        for prefix in ("tls", "cluster_tls"):
            every[f"{prefix}_certificate_file"] = made.certificate_file
            every[f"{prefix}_key_file"] = made.key_file
        return every

    def _settings(self, name: str) -> Mapping[str, object]:
        return {**self._own_settings(name), **self._key_settings(name)}

    def _key_settings(self, name: str) -> Mapping[str, object]:
        if self._cluster_key is None:
            return {}
        found: dict[str, object] = {"keys_file": self._options.keys_file}
        if name != "checkpoint":  # which calls nobody
            found["cluster_key_file"] = self._cluster_key
        return found

    @property
    def _checkpoint_target(self) -> str:
        """Where the servers call the Checkpoint server."""
        child = self._children["checkpoint"]
        return f"127.0.0.1:{child.cluster_port or child.port}"

    def _own_settings(self, name: str) -> Mapping[str, object]:
        options, addresses = self._options, self.addresses
        base_model = options.base_model
        if Path(base_model).is_dir():
            base_model = str(Path(base_model).resolve())
        if name == GATEWAY:
            return self._gateway_settings(addresses["training"], base_model)
        if name == "checkpoint":
            return {"data_folder": options.data.resolve() / "checkpoints"}
        if name == "sampler":
            return {
                "base_model": base_model,
                "dtype": options.dtype,
                "threads": options.threads,
                "checkpoint_target": self._checkpoint_target,
                "checkpoint_folder": options.data.resolve() / "checkpoints",
            }
        return {
            "data_folder": options.data.resolve() / "training",
            "sampler_address": f":{self._children['sampler'].port}",
            "checkpoint_address": f":{self._children['checkpoint'].port}",
            # One on a free port is started after this one: the command that runs on it is told.
            **({"gateway_url": self.gateway_url} if options.gateway_port else {}),
            "checkpoint_target": self._checkpoint_target,
            "checkpoint_folder": options.data.resolve() / "checkpoints",
            **({"durability": options.durability} if options.durability else {}),
            "spawn_ranks": options.ranks,
            "spawn_spare_groups": options.spare_groups,
            "spawn_base_model": base_model,
            "spawn_dtype": options.dtype,
            "spawn_engine": options.engine,
            "spawn_zero_stage": options.zero_stage,
            "spawn_threads": options.threads,
        }

    def _gateway_settings(self, training_address: str, base_model: str) -> Mapping[str, object]:
        settings: dict[str, object] = {"training_address": training_address}
        # SDKs on this machine load the tokenizer from the folder, unless somebody says otherwise.
        if Path(base_model).is_dir() and "tokenizer_ids" not in GatewaySettings.given([]):
            folder = Path(base_model)
            settings["tokenizer_ids"] = json.dumps({folder.name: loadable(folder)})
        return settings

    # --- start, keep, stop --------------------------------------------------------------------

    async def start(self) -> None:
        """Start everything and wait until all serve.

        Raises:
            UpError: A server says that it cannot start and that a restart cannot help.
        """
        self._followers = [asyncio.create_task(log.follow()) for log in self._logs]
        for name in reversed(self._children):  # each needs the ports of those after it
            child = self._children[name]
            self._keepers.append(asyncio.create_task(self._keep(child)))
            await self._unless_hopeless(child.listening.wait())
        children = list(self._children.values())
        await self._unless_hopeless(asyncio.gather(*map(self._until_serving, children)))
        self._served.set()

    async def _unless_hopeless(self, start: Awaitable[object]) -> None:
        waiting = asyncio.ensure_future(start)
        try:
            await asyncio.wait([waiting, *self._keepers], return_when=asyncio.FIRST_COMPLETED)
            for keeper in self._keepers:
                if keeper.done():
                    keeper.result()  # an UpError
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    async def _until_serving(self, child: Child) -> None:
        if child.name == GATEWAY:
            ca_file = None if self._tls is None else self._tls.ca_file
            while not child.serving:
                child.serving = await is_ready(child.port, ca_file)
                await asyncio.sleep(0.1)
            return
        request = health_pb2.HealthCheckRequest(service=SERVICES[child.name])
        address = f"127.0.0.1:{child.port}"
        async with open_aio_channel(address, certificates=self._trusted()) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while not child.serving:
                with contextlib.suppress(grpc.RpcError):
                    response = await stub.Check(request, timeout=5)
                    child.serving = response.status == health_pb2.HealthCheckResponse.SERVING
                await asyncio.sleep(0.1)

    def _trusted(self) -> Certificates | None:
        """By what this process knows them."""
        if self._tls is None:
            return None
        return Certificates(Files("up", "tls", "", "", str(self._tls.ca_file), "ca_file"))

    async def _keep(self, child: Child) -> None:
        """Start a server, and start it again whenever it ends."""
        delay_s = RESTART_DELAY_S_FIRST
        loop = asyncio.get_running_loop()
        while True:
            started_s = loop.time()
            try:
                await child.start({**self._certificates(), **self._settings(child.name)})
                status = await child.wait()
            except Ended as ended:
                status = ended.status
            log = self._options.data / "logs" / f"{child.name}.log"
            if status == EXIT_HOPELESS and not self._served.is_set():
                await asyncio.sleep(0.2)  # its last line is shown first
                raise UpError(f"the {child.name} server cannot start; {log} says why")
            if self._served.is_set() and not self._keep_on:
                return
            # What somebody killed is wanted back at once; what ends by itself, ever more slowly.
            if status < 0 or loop.time() - started_s > SETTLED_S:
                delay_s = RESTART_DELAY_S_FIRST
            _log.warning(
                "the %s server ended (%s) and is started again in %g s; see %s",
                *(child.name, describe_exit(status), delay_s, log),
            )
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, RESTART_DELAY_S_MAX)

    async def keep_running(self) -> None:
        """Return never, but when cancelled."""
        await asyncio.gather(*self._keepers)

    async def stop(self) -> None:
        """Stop all, Training first: a save that is under way needs the Checkpoint server."""
        for task in [*self._keepers, *self._followers]:
            task.cancel()
        await asyncio.gather(*self._keepers, *self._followers, return_exceptions=True)
        for child in self._children.values():
            await child.stop()

    def kill(self) -> None:
        """End all at once; `stop` must still be awaited."""
        for child in self._children.values():
            child.kill()

    async def __aenter__(self) -> "EmbeddedCluster":
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
