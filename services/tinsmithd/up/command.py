"""`tinsmith up`: the whole cluster on this machine, on loopback, with its data in one folder.

Starts the Checkpoint server, the Sampler, the Training server (which starts the ranks) and, where
`tinsmith[gateway]` is installed, the gateway for stock Tinker SDKs and OpenAI clients, each a
process of its own, as in a real cluster; says what they are doing until all serve; keeps them
running. With a command after `--` it runs that against the cluster and then stops.
"""

import argparse
import asyncio
import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinsmith.addresses import GATEWAY_VARIABLE
from tinsmith.channels import CA_VARIABLE
from tinsmithd.config import Config, ConfigError, TrainerConfig, TrainingConfig
from tinsmithd.config.fields import PORT_MAX, choices_of, default_of
from tinsmithd.keys import KeyFileError
from tinsmithd.processes import StderrWriter, log_to_stderr
from tinsmithd.up import gateway
from tinsmithd.up.embedded import EmbeddedCluster, Options, UpError

_OF_RANKS = ("ranks", "dtype", "engine", "zero_stage", "threads")
"""Settings of the ranks that are options of this command."""


def _parse(argv: Sequence[str] | None) -> tuple[Options, list[str]]:
    parser = argparse.ArgumentParser(prog="tinsmith", description="A training API on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="run a cluster on this machine", description=__doc__)
    defaults = Options("", Path())
    up.add_argument("--base-model", required=True, help="Hugging Face name or folder")
    up.add_argument("--data", type=Path, default=Path("tinsmith-data"), help="folder for all data")
    up.add_argument(
        "--spare-groups", type=int, default=0, help="rank groups that stand by for a quick return"
    )
    up.add_argument("--port", type=int, default=defaults.port, help="Training's; 0 takes free ones")
    gateways = up.add_mutually_exclusive_group()
    gateways.add_argument(
        "--gateway-port",
        type=_port,
        help=f"the gateway's; 0 takes a free one (default: {gateway.PORT}; a free one if that is "
        "taken, or --port is 0)",
    )
    gateways.add_argument("--no-gateway", action="store_true", help="start no gateway")
    up.add_argument(
        "--keys",
        type=_absolute,
        dest="keys_file",
        metavar="FILE",
        help="callers need a key of this file, which `tinsmith keys` looks after",
    )
    for key in _OF_RANKS:
        _add_setting(up, TrainerConfig, key)
    _add_setting(up, TrainingConfig, "durability")
    up.add_argument(
        "--tls", action="store_true", help="speak TLS, with certificates that it makes for itself"
    )
    up.add_argument("run", nargs="*", metavar="-- COMMAND", help="run this against it, then stop")
    args = vars(parser.parse_args(argv))
    del args["command"]
    run = args.pop("run")
    args["gateway_port"] = _gateway_port(parser, args, off=args.pop("no_gateway"))
    of_processes: dict[type[Config], dict[str, Any]] = {
        TrainerConfig: {key: args[key] for key in ("base_model", *_OF_RANKS)},
        TrainingConfig: {"spawn_spare_groups": args["spare_groups"]},
    }
    try:
        for kind, settings in of_processes.items():
            kind(**settings)  # refuses what no process would take
    except ConfigError as error:
        parser.error(str(error))
    if args["ranks"] == 0:  # for pods one for each GPU, and of a Training server none at all
        parser.error("trainer.ranks: must be at least 1, is 0")
    return Options(**args), run


def _absolute(text: str) -> Path:
    return Path(text).absolute()


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= PORT_MAX:
        raise ValueError(text)
    return port


def _gateway_port(
    parser: argparse.ArgumentParser, args: dict[str, Any], *, off: bool
) -> int | None:
    """Where the gateway is to listen; None where there is to be none."""
    port: int | None = args["gateway_port"]
    if off:
        return None
    if lost := gateway.lacks():
        how = f"{', '.join(lost)} is not installed: pip install 'tinsmith[gateway]'"
        if port is not None:
            parser.error(f"--gateway-port: {how}")
        return None
    if port is None:
        return gateway.PORT if args["port"] and gateway.is_free(gateway.PORT) else 0
    if port and not gateway.is_free(port):
        parser.error(f"--gateway-port: port {port} is taken; 0 takes a free one")
    return port


def _add_setting(parser: argparse.ArgumentParser, kind: type[Config], key: str) -> None:
    """Add a setting of a process, which has the default that `Options` has."""
    field = kind.model_fields[key]
    parser.add_argument(
        f"--{key.replace('_', '-')}",
        type=type(default_of(field)),
        choices=choices_of(field),
        default=getattr(Options, key),
        help=(field.description or "").replace("%", "%%"),
    )


def _banner(cluster: EmbeddedCluster, options: Options) -> str:
    folder = Path(options.base_model)
    name = folder.resolve().name if folder.is_dir() else options.base_model
    lines = [f"Tinsmith is ready: {name}, {options.ranks} rank(s), {options.engine} engine"]
    lines += [f"  {name.capitalize():<11}{at}" for name, at in cluster.addresses.items()]
    lines += [f"{name}={value}" for name, value in _variables(cluster).items()]
    code = f'import tinsmith; print(tinsmith.ServiceClient(base_url="{cluster.address}").'
    code += "get_server_capabilities())"
    trust = "" if cluster.tls is None else f"{CA_VARIABLE}={cluster.tls.ca_file} "
    lines.append(f"Try it:  {trust}{shlex.join([Path(sys.executable).name, '-c', code])}")
    lines.append("Ctrl-C stops it; saved checkpoints stay in " + str(options.data))
    return "\n".join(lines)


def _variables(cluster: EmbeddedCluster) -> dict[str, str]:
    """What programs of others find the cluster by, and whom they trust."""
    found = {}
    if cluster.tls is not None:
        found = {CA_VARIABLE: str(cluster.tls.ca_file)}
    if cluster.gateway_url is not None:
        found["TINKER_BASE_URL"] = cluster.gateway_url
        found["OPENAI_BASE_URL"] = f"{cluster.gateway_url}/v1"
        if cluster.tls is not None:  # what Python's `ssl` reads, and with it the SDKs of others
            found["SSL_CERT_FILE"] = str(cluster.tls.roots_file)
    return found


async def _up(options: Options, command: Sequence[str]) -> int:
    cluster = EmbeddedCluster(options, StderrWriter().write_line)
    stopping = asyncio.Event()

    def asked() -> None:
        if stopping.is_set():  # a second Ctrl-C
            cluster.kill()
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked)
    stop = asyncio.create_task(stopping.wait())
    main = asyncio.create_task(_serve(cluster, options, command))
    try:
        await asyncio.wait([main, stop], return_when=asyncio.FIRST_COMPLETED)
        if main.done():
            return main.result()
        print("stopping; Ctrl-C again ends everything at once", file=sys.stderr)
        return 130 if command else 0
    finally:
        main.cancel()
        with contextlib.suppress(asyncio.CancelledError, UpError):
            await main
        await cluster.stop()


async def _serve(cluster: EmbeddedCluster, options: Options, command: Sequence[str]) -> int:
    await cluster.start()
    print(_banner(cluster, options), flush=True)
    if not command:
        await cluster.keep_running()
    found = {"TINSMITH_ADDRESS": cluster.address, **_variables(cluster)}
    keys: dict[str, str] = {}
    if cluster.gateway_url is not None:
        found[GATEWAY_VARIABLE] = cluster.gateway_url
        # Their clients want a key, even where there are none.
        keys = {"TINKER_API_KEY": "tml-none", "OPENAI_API_KEY": "none"}
    environment = {**keys, **os.environ, **found}
    process = await asyncio.create_subprocess_exec(*command, env=environment)
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the `tinsmith` command."""
    options, command = _parse(argv)
    log_to_stderr("WARNING", "up")
    try:
        sys.exit(asyncio.run(_up(options, command)))
    except (UpError, ConfigError, KeyFileError, OSError) as error:
        sys.exit(f"tinsmith: {error}")
