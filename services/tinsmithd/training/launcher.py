"""Starts the rank group on this machine and starts it again when it dies."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence

from tinsmithd.config import TrainingConfig

_log = logging.getLogger(__name__)

EXIT_HOPELESS = 78
"""Exit status of a rank for which a restart cannot help (EX_CONFIG of sysexits.h)."""

RESTART_DELAY_S_MAX = 30.0
STOP_S_MAX = 10.0


class LaunchError(Exception):
    """The rank group cannot start, and trying again cannot help."""


class Launcher:
    """Keeps one rank group running as child processes.

    One rank is a plain child; several are started by `torchrun`, which ends all when one dies.
    """

    def __init__(self, config: TrainingConfig, port: int) -> None:
        self._config = config
        self._port = port
        self._process: asyncio.subprocess.Process | None = None

    async def run(self) -> None:
        """Run until cancelled.

        Raises:
            LaunchError: The ranks say that a restart cannot help; their log says why.
        """
        delay_s = 1.0
        loop = asyncio.get_running_loop()
        try:
            while True:
                started_s = loop.time()
                # A session of its own: Ctrl-C goes to this server, which then stops the ranks.
                self._process = await asyncio.create_subprocess_exec(
                    *self._command(), env=self._environment(), start_new_session=True
                )
                status = await self._process.wait()
                if status == EXIT_HOPELESS:
                    raise LaunchError("the trainer cannot start; its log says why")
                if loop.time() - started_s > RESTART_DELAY_S_MAX:
                    delay_s = 1.0
                _log.error("the rank group ended (%s); restart in %g s", _describe(status), delay_s)
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, RESTART_DELAY_S_MAX)
        finally:
            await self._stop()

    def _command(self) -> Sequence[str]:
        if self._config.spawn_ranks == 1:
            return [sys.executable, "-m", "tinsmithd.trainer"]
        return [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            f"--nproc-per-node={self._config.spawn_ranks}",
            *("-m", "tinsmithd.trainer"),
        ]

    def _environment(self) -> dict[str, str]:
        config = self._config
        settings = {
            "training_target": f"127.0.0.1:{self._port}",
            "base_model": config.spawn_base_model,
            "dtype": config.spawn_dtype,
            "engine": config.spawn_engine,
            "zero_stage": config.spawn_zero_stage,
            "threads": config.spawn_threads,
            "log_level": config.log_level,
            "live_with_pid": os.getpid(),
        }
        environment = {f"TINSMITH_TRAINER_{k.upper()}": str(v) for k, v in settings.items()}
        # torchrun must find the same packages, and its ranks must not leave this machine.
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        # What torchrun gives its ranks after SIGTERM; less than `_stop` gives torchrun.
        ours = {"GLOO_SOCKET_IFNAME": "lo", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
        return {**ours, **os.environ, **environment}

    async def _stop(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), STOP_S_MAX)
        except TimeoutError:
            # Ranks have sessions of their own; the kernel ends them with torchrun, their parent.
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


def _describe(status: int) -> str:
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"
