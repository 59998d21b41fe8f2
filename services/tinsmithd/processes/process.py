"""What every process of this project does around its own work: logging, Ctrl-C, ending in time."""

import asyncio
import contextlib
import ctypes
import logging
import os
import resource
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn, Protocol, TypeVar

import uvloop

from tinsmithd import tracing
from tinsmithd.config import Config, ConfigError
from tinsmithd.formats import FormatUnknown
from tinsmithd.processes.logs import is_json, log_to_stderr
from tinsmithd.text import bounded

C = TypeVar("C", bound=Config)
_log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # of prctl.h
FILES_FEW = 4096
"""Fewer descriptors than this are soon used up by connections alone."""

WHY_BYTES_MAX = 2000
SPANS_S_MAX = 1.0
"""How long a process that ends waits for its last spans to be taken."""
UMASK = 0o077
"""What a server writes is for its own user alone."""

EXIT_HOPELESS = 78
"""Exit status of a process for which a restart cannot help until somebody changes something: its
settings, its model, its disk (EX_CONFIG of sysexits.h)."""

EXIT_ORPHANED = 1
"""Exit status of a process that ends because another one did, which it was to live with."""


def give_up(section: str, why: object) -> NoReturn:
    """End this process with one line that says why a restart cannot help.

    Args:
        section: What the process is called.
        why: What somebody has to change.
    """
    if is_json():
        _log.critical("cannot run: %s", bounded(str(why), WHY_BYTES_MAX))
    else:
        print(f"tinsmithd.{section}: {bounded(str(why), WHY_BYTES_MAX)}", file=sys.stderr)
    sys.exit(EXIT_HOPELESS)


def load_or_exit(kind: type[C]) -> C:
    """Read the settings of this process, or end with one line that says what is wrong."""
    try:
        return kind.load()
    except ConfigError as error:
        with contextlib.suppress(ConfigError, KeyError):
            if kind.given()["log_format"].value == "json":
                log_to_stderr("ERROR", kind.section, "json")
        give_up(kind.section, error)


def set_up(config: Config) -> None:
    """Log to standard error, keep files to this user, and end when `live_with_pid` ends.

    To be called before torch is imported.
    """
    # Journals hold what users sent, and the secrets of links and fences are files, too.
    os.umask(UMASK)
    wait_passively()
    log_to_stderr(config.log_level, config.section, config.log_format)
    for warning in config.warnings():
        _log.warning(warning)
    raise_files_limit()
    if config.live_with_pid:
        threading.Thread(target=_end_with, args=(config.live_with_pid,), daemon=True).start()


def wait_passively() -> None:
    """Let threads of torch that wait for work sleep; to be called before torch is imported.

    Threads that wait by spinning take the cores from every other process: with three busy processes
    on two cores a training step was seen to take forty times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def die_with_parent(parent: int) -> None:
    """Let the kernel end this process with its parent: not even a stopped one outlives it.

    Only Linux can do this; elsewhere nothing happens.

    Args:
        parent: Who it is; a process that has another parent by now ends at once.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before that
        os._exit(EXIT_ORPHANED)


def raise_files_limit() -> None:
    """Let this process open as many files and connections as its administrator allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:  # a system that says unlimited and means less
        _log.warning("the limit of open files stays %d: %s", soft, error)
        return
    _log.info("may open %d files and connections (was %d)", hard, soft)
    if 0 <= hard < FILES_FEW:
        _log.warning("the hard limit of open files is low: callers can use up %d of them", hard)


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
    os._exit(EXIT_ORPHANED)


class Server(Protocol):
    """What runs as a process of its own."""

    async def start(self) -> None:
        """Bind and serve."""

    async def run(self) -> None:
        """Serve until a signal, then stop."""


def serve(
    kind: type[C],
    make: Callable[[C], Server],
    *hopeless: type[Exception],
    new_loop: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop,
) -> None:
    """Run a server as this process; Ctrl-C ends it quietly.

    Args:
        kind: Its settings, read from where this process takes them.
        make: Makes the server of its settings, on its event loop.
        hopeless: Errors for which a restart cannot help, beside those of the settings and of their
            files, and data of a later release: the process says why and gives up.
        new_loop: Makes its event loop.
    """
    config = load_or_exit(kind)
    set_up(config)

    async def main() -> None:
        server = make(config)
        await server.start()
        await server.run()

    try:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # such as a port that is taken
        give_up(config.section, error.strerror or error)
    except (ConfigError, FormatUnknown) as error:
        give_up(config.section, error)
    except hopeless as error:
        give_up(config.section, error)
    finally:
        tracing.stop(SPANS_S_MAX)
