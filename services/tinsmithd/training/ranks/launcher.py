"""Starts rank groups on this machine and starts them again when they die."""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
from pathlib import Path

from tinsmithd.config import TrainingConfig
from tinsmithd.processes import EXIT_HOPELESS, describe_exit, environment, restarts, template

_log = logging.getLogger(__name__)

CAUSE_WAIT_S_MAX = 3.0
"""A connection that breaks does not say why; its process ends about then."""
ENDED_KEPT_MAX = 64
_MODULE = "tinsmithd.trainer"
_PRELOAD = "tinsmithd.trainer.preload"
_FROM_OUTSIDE = [
    status
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
    for status in (-number, 128 + number)
]
"""Of a process that ended so, and as a rank group reports one of its ranks."""
_CERTIFICATE = ("cluster_tls_certificate_file", "cluster_tls_key_file", "cluster_tls_ca_file")
_OF_ANOTHER_JOB = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class LaunchError(Exception):
    """The rank group cannot start, and another try does not help."""


class Launcher:
    """Keeps rank groups running as child processes: one, and those that stand by.

    A group of one rank is a plain child; for several ranks, a child starts them and ends all when
    one dies. Where there is no accelerator, a template that has imported what they need forks them:
    imports are most of the time that a group takes to come back. Each child gets a token that
    nobody else knows: it is the only thing in what a rank group says of itself that this class
    believes.

    Args:
        config: What to start.
        link_address: Where the ranks attach.
        secret_file: Has the secret that they show there.
    """

    def __init__(self, config: TrainingConfig, link_address: str, secret_file: Path) -> None:
        self._config = config
        self._link_address = link_address
        self._secret_file = secret_file
        self._template = template.shared() or template.Template(_PRELOAD)
        self._running: dict[str, template.Program] = {}
        self._ended: dict[str, int] = {}
        self._out_of_memory_count = _out_of_memory_count()

    async def blamed(self, token: str) -> bool:
        """Whether a group ends by itself, not because somebody ended it.

        Nobody knows that of a group that somebody else started: it is blamed.

        Args:
            token: Its launch token.
        """
        process = self._running.get(token)
        if process is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(process.wait()), CAUSE_WAIT_S_MAX)
        elif token not in self._ended:
            return True
        status = self._ended.get(token) if process is None else process.returncode
        if status is None:  # it lives, and only lost its connection
            return False
        before, self._out_of_memory_count = self._out_of_memory_count, _out_of_memory_count()
        return status not in _FROM_OUTSIDE or self._out_of_memory_count > before

    def end(self, token: str) -> None:
        """End a group at once, if this launcher started it; it starts again.

        Args:
            token: Its launch token; an unknown one has no effect.
        """
        process = self._running.get(token)
        if process is not None:
            restarts.kill(process)

    async def run(self) -> None:
        """Run until cancelled.

        Raises:
            LaunchError: The ranks say that a restart does not help; their log says why.
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
            self._template.close()

    async def _keep(self) -> None:
        """Keep one group running."""
        pauses = restarts.Pauses()
        loop = asyncio.get_running_loop()
        while True:
            started_s = loop.time()
            token = secrets.token_hex(16)
            # A session of its own: Ctrl-C goes to this server, which then stops the ranks. Who it
            # lives with is an argument, so that a list of processes shows whose ranks they are.
            arguments = [f"--live-with-pid={os.getpid()}"]
            launch = template.Launch(_MODULE, arguments, self._environment(token))
            process = await self._template.start(launch)
            self._running[token] = process
            try:
                status = await process.wait()
            finally:
                await restarts.stop(process)
                self._forget(token)
            if status == EXIT_HOPELESS:
                raise LaunchError("the ranks cannot start; their log says why")
            pause_s = pauses.after(loop.time() - started_s)
            _log.error("a rank group ended (%s); restart in %g s", describe_exit(status), pause_s)
            await asyncio.sleep(pause_s)

    def _forget(self, token: str) -> None:
        status = self._running.pop(token).returncode
        if status is not None:
            self._ended[token] = status
        while len(self._ended) > ENDED_KEPT_MAX:
            del self._ended[next(iter(self._ended))]

    def _environment(self, token: str) -> dict[str, str]:
        config = self._config
        settings = {
            "training_target": self._link_address,
            "link_secret_file": self._secret_file.resolve(),
            "launch_token": token,
            "ranks": config.spawn_ranks,
            "base_model": config.spawn_base_model,
            "dtype": config.spawn_dtype,
            "engine": config.spawn_engine,
            "zero_stage": config.spawn_zero_stage,
            "threads": config.spawn_threads,
            "log_level": config.log_level,
            "log_format": config.log_format,
            "otlp_endpoint": config.otlp_endpoint,
        }
        if (
            config.cluster_tls_certificate_file
        ):  # they are this server's, on its machine, as its user
            settings |= {key: Path(getattr(config, key)).resolve() for key in _CERTIFICATE}
        ours = {f"TINSMITH_TRAINER_{k.upper()}": str(v) for k, v in settings.items()}
        # This server may be part of a job that numbers ranks: those are other ranks.
        return {k: v for k, v in environment(**ours).items() if k not in _OF_ANOTHER_JOB}


def _out_of_memory_count() -> int:
    """Number of processes of this machine that the kernel ended for lack of memory."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
