"""`tinsmith up`: the whole cluster on this machine, on loopback, with its data in one folder.

Starts the Checkpoint server, the Sampler and the Training server (which starts the ranks), each a
process of its own, as in a real cluster; says what they are doing until all serve; keeps them
running. With a command after `--` it runs that against the cluster and then stops.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tinsmithd.config import ConfigError
from tinsmithd.rpc.channels import open_aio_channel

_log = logging.getLogger(__name__)

SERVICES = {
    "training": "tinsmith.v1.TrainingService",
    "sampler": "tinsmith.v1.SamplerService",
    "checkpoint": "tinsmith.v1.CheckpointService",
}
STOP_S_MAX = 30.0
RESTART_DELAY_S = 1.0
LOG_LINE_BYTES_MAX = 1024 * 1024


class UpError(Exception):
    """The cluster cannot start; the message says why."""


@dataclass(frozen=True)
class Options:
    """What to run. `port` is Training's; the Sampler has the next, Checkpoint the one after."""

    base_model: str
    data: Path
    ranks: int = 1
    port: int = 50051
    dtype: str = "float32"
    engine: str = "deepspeed"
    zero_stage: int = 1
    threads: int = 0
    spare_groups: int = 0
    durability: str = ""
    """Empty leaves it to the Training server's own settings."""


class _Child:
    """One server process: started, logged to a file, restarted on the same port when it dies."""

    def __init__(self, name: str, port: int, log_file: Path, *, quiet: bool) -> None:
        self.name = name
        self.port = port
        self.serving = False
        self._log_file = log_file
        self._quiet = quiet
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None

    async def start(self, settings: Mapping[str, object]) -> None:
        """Start it and wait until its port is bound.

        Raises:
            UpError: It ended before that.
        """
        with tempfile.TemporaryDirectory() as folder:
            port_file = Path(folder) / "port"
            every = {
                "listen_address": f"127.0.0.1:{self.port}",
                "port_file": port_file,
                "live_with_pid": os.getpid(),
                **settings,
            }
            prefix = f"TINSMITH_{self.name.upper()}_"
            environment = {prefix + key.upper(): str(value) for key, value in every.items()}
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", f"tinsmithd.{self.name}"),
                env={**os.environ, **environment},
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for `up`, which stops them in order
                limit=LOG_LINE_BYTES_MAX,
            )
            self._reader = asyncio.create_task(self._read_log(self._process))
            while not port_file.exists():
                if self._process.returncode is not None:
                    raise UpError(f"the {self.name} server ended; see {self._log_file}")
                await asyncio.sleep(0.02)
            self.port = int(port_file.read_text())

    async def _read_log(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        with self._log_file.open("ab") as file:
            async for line in process.stderr:
                file.write(line)
                file.flush()
                loud = b" WARNING " in line or b" ERROR " in line
                if not self._quiet and (loud or not self.serving):
                    sys.stderr.buffer.write(line)
                    sys.stderr.buffer.flush()

    async def wait(self) -> int:
        """Wait until it ends; returns its exit status."""
        assert self._process is not None
        return await self._process.wait()

    async def stop(self) -> None:
        """Let it end gracefully, or end it."""
        if self._process is None:
            return
        if self._process.returncode is None:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), STOP_S_MAX)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        if self._reader is not None:
            await self._reader


class EmbeddedCluster:
    """All servers of a cluster as child processes; an async context manager.

    Attributes:
        address: Training's `host:port`, the one that a client needs.
    """

    def __init__(self, options: Options, *, quiet: bool = False) -> None:
        self._options = options
        logs = options.data / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self._children = {
            name: _Child(
                name,
                options.port + offset if options.port else 0,
                logs / f"{name}.log",
                quiet=quiet,
            )
            for offset, name in enumerate(SERVICES)
        }

    @property
    def address(self) -> str:
        """Training's address."""
        return self.addresses["training"]

    @property
    def addresses(self) -> Mapping[str, str]:
        """Each server's address, by its name."""
        return {name: f"127.0.0.1:{child.port}" for name, child in self._children.items()}

    def _settings(self, name: str) -> Mapping[str, object]:
        options, addresses = self._options, self.addresses
        base_model = options.base_model
        if Path(base_model).is_dir():
            base_model = str(Path(base_model).resolve())
        if name == "checkpoint":
            return {"data_folder": options.data.resolve() / "checkpoints"}
        if name == "sampler":
            return {
                "base_model": base_model,
                "dtype": options.dtype,
                "threads": options.threads,
                "checkpoint_target": addresses["checkpoint"],
            }
        return {
            "data_folder": options.data.resolve() / "training",
            "sampler_address": f":{self._children['sampler'].port}",
            "checkpoint_address": f":{self._children['checkpoint'].port}",
            "checkpoint_target": addresses["checkpoint"],
            **({"durability": options.durability} if options.durability else {}),
            "spawn_ranks": options.ranks,
            "spawn_spare_groups": options.spare_groups,
            "spawn_base_model": base_model,
            "spawn_dtype": options.dtype,
            "spawn_engine": options.engine,
            "spawn_zero_stage": options.zero_stage,
            "spawn_threads": options.threads,
        }

    async def start(self) -> None:
        """Start everything and wait until all serve.

        Raises:
            UpError: A server ended instead.
        """
        for name in reversed(SERVICES):  # each needs the ports of those after it
            await self._children[name].start(self._settings(name))
        waits = [asyncio.create_task(self._until_serving(child)) for child in self._all]
        ends = [asyncio.create_task(child.wait()) for child in self._all]
        try:
            pending: set[asyncio.Task[None]] = set(waits)
            while pending:
                done, _ = await asyncio.wait([*pending, *ends], return_when=asyncio.FIRST_COMPLETED)
                for child, end in zip(self._all, ends, strict=True):
                    if end in done:
                        raise UpError(f"the {child.name} server ended; its log says why")
                pending -= done  # type: ignore[arg-type]
        finally:
            for task in [*waits, *ends]:
                task.cancel()

    @property
    def _all(self) -> Sequence[_Child]:
        return list(self._children.values())

    async def _until_serving(self, child: _Child) -> None:
        request = health_pb2.HealthCheckRequest(service=SERVICES[child.name])
        async with open_aio_channel(f"127.0.0.1:{child.port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while not child.serving:
                with contextlib.suppress(grpc.RpcError):
                    response = await stub.Check(request, timeout=5)
                    child.serving = response.status == health_pb2.HealthCheckResponse.SERVING
                await asyncio.sleep(0.1)

    async def keep_running(self) -> None:
        """Start again what ends, until cancelled."""
        await asyncio.gather(*(self._keep(child) for child in self._all))

    async def _keep(self, child: _Child) -> None:
        while True:
            status = await child.wait()
            _log.warning("the %s server ended (status %d) and is started again", child.name, status)
            await asyncio.sleep(RESTART_DELAY_S)
            with contextlib.suppress(UpError):
                await child.start(self._settings(child.name))

    async def stop(self) -> None:
        """Stop all, Training first: a save that is under way needs the Checkpoint server."""
        for child in self._all:
            await child.stop()

    async def __aenter__(self) -> "EmbeddedCluster":
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()


def _parse(argv: Sequence[str] | None) -> tuple[Options, list[str]]:
    parser = argparse.ArgumentParser(prog="tinsmith", description="A training API on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="run a cluster on this machine", description=__doc__)
    defaults = Options("", Path())
    up.add_argument("--base-model", required=True, help="Hugging Face name or folder")
    up.add_argument("--data", type=Path, default=Path("tinsmith-data"), help="folder for all data")
    up.add_argument("--ranks", type=int, default=defaults.ranks, help="training processes")
    up.add_argument(
        "--spare-groups", type=int, default=0, help="rank groups that stand by for a quick return"
    )
    up.add_argument("--port", type=int, default=defaults.port, help="Training's; 0 takes free ones")
    up.add_argument("--dtype", choices=("float32", "bfloat16"), default=defaults.dtype)
    up.add_argument("--engine", choices=("deepspeed", "reference"), default=defaults.engine)
    up.add_argument("--zero-stage", type=int, choices=(0, 1, 2, 3), default=defaults.zero_stage)
    up.add_argument(
        "--durability",
        choices=("fsync", "async", "none"),
        default=defaults.durability,
        help="what survives: a loss of power (the default), the death of any process, nothing",
    )
    up.add_argument("--threads", type=int, default=0, help="CPU threads per process")
    up.add_argument("run", nargs="*", metavar="-- COMMAND", help="run this against it, then stop")
    args = vars(parser.parse_args(argv))
    del args["command"]
    run = args.pop("run")
    if args["ranks"] < 1:
        parser.error("--ranks must be at least 1")
    return Options(**args), run


def _banner(cluster: EmbeddedCluster, options: Options) -> str:
    folder = Path(options.base_model)
    name = folder.resolve().name if folder.is_dir() else options.base_model
    lines = [f"Tinsmith is ready: {name}, {options.ranks} rank(s), {options.engine} engine"]
    lines += [f"  {name.capitalize():<11}{at}" for name, at in cluster.addresses.items()]
    code = f'import tinsmith; print(tinsmith.ServiceClient("{cluster.address}").'
    code += "get_server_capabilities())"
    lines.append(f"Try it:  {shlex.join([Path(sys.executable).name, '-c', code])}")
    lines.append("Ctrl-C stops it; saved checkpoints stay in " + str(options.data))
    return "\n".join(lines)


async def _up(options: Options, command: Sequence[str]) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    stopping = asyncio.create_task(stop.wait())
    cluster = EmbeddedCluster(options)
    main = asyncio.create_task(_serve(cluster, options, command))
    try:
        await asyncio.wait([main, stopping], return_when=asyncio.FIRST_COMPLETED)
        if main.done():
            return main.result()
        print("stopping", file=sys.stderr)
        return 130 if command else 0
    finally:
        main.cancel()
        with contextlib.suppress(asyncio.CancelledError, UpError):
            await main
        await cluster.stop()


async def _serve(cluster: EmbeddedCluster, options: Options, command: Sequence[str]) -> int:
    await cluster.start()
    print(_banner(cluster, options), flush=True)
    keeper = asyncio.create_task(cluster.keep_running())
    try:
        if not command:
            await keeper
        environment = {**os.environ, "TINSMITH_ADDRESS": cluster.address}
        process = await asyncio.create_subprocess_exec(*command, env=environment)
        try:
            return await process.wait()
        finally:
            if process.returncode is None:
                process.terminate()
                await process.wait()
    finally:
        keeper.cancel()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the `tinsmith` command."""
    options, command = _parse(argv)
    logging.basicConfig(format="%(asctime)s up %(levelname)s %(message)s", datefmt="%H:%M:%S")
    try:
        sys.exit(asyncio.run(_up(options, command)))
    except (UpError, ConfigError, OSError) as error:
        sys.exit(f"tinsmith: {error}")


if __name__ == "__main__":
    main()
