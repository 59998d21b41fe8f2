"""`tinsmith up`: the whole cluster on this machine, on loopback, with its data in one folder.

Starts the Checkpoint server, the Sampler and the Training server (which starts the ranks), each a
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

from tinsmithd.config import ConfigError
from tinsmithd.processes import StderrWriter, log_to_stderr
from tinsmithd.up.embedded import EmbeddedCluster, Options, UpError


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
    code = f'import tinsmith; print(tinsmith.ServiceClient(base_url="{cluster.address}").'
    code += "get_server_capabilities())"
    lines.append(f"Try it:  {shlex.join([Path(sys.executable).name, '-c', code])}")
    lines.append("Ctrl-C stops it; saved checkpoints stay in " + str(options.data))
    return "\n".join(lines)


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
    environment = {**os.environ, "TINSMITH_ADDRESS": cluster.address}
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
    except (UpError, ConfigError, OSError) as error:
        sys.exit(f"tinsmith: {error}")
