"""Starts rank groups on this machine and starts them again when they die."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tinsmithd.config import TrainingConfig

_log = logging.getLogger(__name__)

EXIT_HOPELESS = 78
"""Exit status of a rank for which a restart cannot help (EX_CONFIG of sysexits.h)."""

RESTART_DELAY_S_FIRST = 0.1
RESTART_DELAY_S_MAX = 30.0
STOP_S_MAX = 10.0
SETTLED_S = 3.0
"""Ranks that lived for so long are started again without delay."""
CAUSE_WAIT_S_MAX = 3.0
"""A connection that broke says nothing; the process that had it ends about then."""
ENDED_KEPT_MAX = 64
_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)


class LaunchError(Exception):
    """The rank group cannot start, and trying again cannot help."""


class Launcher:
    """Keeps rank groups running as child processes: one, and those that stand by.

    A group of one rank is a plain child; several ranks are started by `torchrun`, which ends all
    when one dies.
    """

    def __init__(self, config: TrainingConfig, port: int) -> None:
        self._config = config
        self._port = port
        self._running: dict[int, asyncio.subprocess.Process] = {}
        self._ended: dict[int, int] = {}
        self._out_of_memory_count = _out_of_memory_count()

    async def blamed(self, pid: int) -> bool:
        """Whether a group that is just going ends by itself, not by somebody's hand.

        With several ranks it is torchrun that ends, which does not say why: they are blamed.

        Args:
            pid: Process id of its rank 0.
        """
        process = self._running.get(pid)
        if process is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(process.wait()), CAUSE_WAIT_S_MAX)
        elif self._config.spawn_ranks > 1:
            return True
        status = self._ended.get(pid) if process is None else process.returncode
        if status is None:  # it lives, and lost its connection
            return False
        before, self._out_of_memory_count = self._out_of_memory_count, _out_of_memory_count()
        return status not in _FROM_OUTSIDE or self._out_of_memory_count > before

    def end(self, pid: int) -> None:
        """End a group at once; it is started again.

        Args:
            pid: Process id of its rank 0.
        """
        for child in (pid, _parent(pid)):
            if child in self._running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)

    async def run(self) -> None:
        """Run until cancelled.

        Raises:
            LaunchError: The ranks say that a restart cannot help; their log says why.
        """
        groups = [
            asyncio.create_task(self._keep()) for _ in range(1 + self._config.spawn_spare_groups)
        ]
        try:
            await asyncio.gather(*groups)
        finally:
            for group in groups:
                group.cancel()
            await asyncio.gather(*groups, return_exceptions=True)

    async def _keep(self) -> None:
        """Keep one group running."""
        delay_s = RESTART_DELAY_S_FIRST
        loop = asyncio.get_running_loop()
        while True:
            started_s = loop.time()
            # A session of its own: Ctrl-C goes to this server, which then stops the ranks.
            process = await asyncio.create_subprocess_exec(
                *self._command(), env=self._environment(), start_new_session=True
            )
            self._running[process.pid] = process
            try:
                status = await process.wait()
            finally:
                await _stop(process)
                self._forget(process)
            if status == EXIT_HOPELESS:
                raise LaunchError("the trainer cannot start; its log says why")
            if loop.time() - started_s > delay_s + SETTLED_S:
                delay_s = RESTART_DELAY_S_FIRST
            _log.error("a rank group ended (%s); restart in %g s", _describe(status), delay_s)
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, RESTART_DELAY_S_MAX)

    def _forget(self, process: asyncio.subprocess.Process) -> None:
        del self._running[process.pid]
        if process.returncode is not None:
            self._ended[process.pid] = process.returncode
        while len(self._ended) > ENDED_KEPT_MAX:
            del self._ended[next(iter(self._ended))]

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


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        await asyncio.wait_for(process.wait(), STOP_S_MAX)
    except TimeoutError:
        # Ranks have sessions of their own; the kernel ends them with torchrun, their parent.
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def _parent(pid: int) -> int:
    """Process id of a process's parent; 0 where there is none to be found."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return 0


def _out_of_memory_count() -> int:
    """How often the kernel has ended a process of this machine for want of memory."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _describe(status: int) -> str:
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"
