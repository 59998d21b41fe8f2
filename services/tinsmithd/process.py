"""What every process of this project does around its own work: logging, Ctrl-C, ending in time."""

import asyncio
import logging
import os
import select
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from tinsmithd.config import Config, ConfigError

C = TypeVar("C", bound=Config)

EXIT_CONFIG = 2
"""Exit status of a process whose settings are wrong."""


def load_or_exit(kind: type[C], status: int = EXIT_CONFIG) -> C:
    """Read the settings of this process, or end with one line that says what is wrong."""
    try:
        return kind.load()
    except ConfigError as error:
        print(f"tinsmithd.{kind.section}: {error}", file=sys.stderr)
        sys.exit(status)


def set_up(config: Config) -> None:
    """Log to standard error, one line per event, and end when `live_with_pid` ends.

    To be called before torch is imported.
    """
    # Threads that wait for work by spinning take the cores from every other process: with three
    # busy processes on two cores a training step was seen to take forty times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(
        stream=sys.stderr,
        level=config.log_level,
        format=f"%(asctime)s {config.section} %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    if config.live_with_pid:
        threading.Thread(target=_end_with, args=(config.live_with_pid,), daemon=True).start()


def _end_with(pid: int) -> None:
    try:
        if hasattr(os, "pidfd_open"):
            select.select([os.pidfd_open(pid)], [], [])
        else:
            while True:
                os.kill(pid, 0)
                time.sleep(1)
    except OSError:
        pass  # it is gone already
    os._exit(1)


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Run a server's main coroutine; Ctrl-C ends quietly."""

    async def entry() -> None:
        await main()

    try:
        asyncio.run(entry())
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # such as a port that is taken
        sys.exit(f"{Path(sys.argv[0]).parent.name}: {error.strerror or error}")
