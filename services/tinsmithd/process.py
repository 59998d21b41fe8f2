"""What every process of this project does around its own work: logging, Ctrl-C, ending in time."""

import asyncio
import ctypes
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

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
MMAP_THRESHOLD_BYTES = 32 * 1024 * 1024
"""Larger buffers are still the kernel's; glibc takes no larger number."""
TRIM_THRESHOLD_BYTES = 128 * 1024 * 1024
"""What is free at the end of the heap beyond this is given back."""

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


def keep_freed_memory() -> None:
    """Let the allocator keep the memory of large messages for the next ones.

    By default glibc gives every buffer over 128 KiB, and what is free at the end of its heap, back
    to the kernel at once, and gets it again page by page: a call of one megabyte cost 1,200 page
    faults. Elsewhere than on glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
        mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)


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
