"""Makes a fork of this process a program, as if Python had been started anew for it."""

import asyncio
import contextlib
import ctypes
import importlib
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tinsmithd import failpoints
from tinsmithd.processes.process import die_with_parent

_ARGUMENTS_START, _ARGUMENTS_END = 48, 49
"""Fields of /proc/self/stat: from where to where the kernel reads a process's command line."""


_forked = False


def is_forked() -> bool:
    """Whether this process was forked from a template, and so has imported what that has."""
    return _forked


class ForkedChild:
    """A program that this process forked by itself.

    Attributes:
        pid: Its process id.
        returncode: As `asyncio.subprocess.Process` has it: None while nobody knows of its end.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    async def wait(self) -> int:
        """Wait until it ends; returns its exit status, below 0 the signal. For one caller."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        process = os.pidfd_open(self.pid)
        loop.add_reader(process, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(process)
            os.close(process)
        return self._reap()

    def _reap(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it runs."""
        if self.returncode is None:
            os.kill(self.pid, number)


def fork(
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    without: Sequence[int] = (),
) -> ForkedChild:
    """Fork `python -P -m MODULE`, which ends with this process; for a process without threads.

    The child does not return: it ends with `SystemExit`, by way of the caller's frames.

    Args:
        module: What it runs.
        arguments: Its `sys.argv[1:]`.
        environment: All variables of it.
        without: Descriptors that it shall not have.
    """
    parent = os.getpid()
    child = os.fork()
    if not child:
        die_with_parent(parent)
        for descriptor in without:
            os.close(descriptor)
        become(module, arguments, environment)
    return ForkedChild(child)


def become(module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Run a module in this process, which was just forked; ends with `SystemExit`."""
    global _forked
    _forked = True
    sys.path[:] = _path(environment)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments
    sys.orig_argv = [sys.executable, "-P", "-m", module, *arguments]
    _rename(sys.orig_argv)
    sys.modules.pop("sitecustomize", None)
    with contextlib.suppress(ImportError):
        importlib.import_module("sitecustomize")
    failpoints.arm()
    _adapt_libraries()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit()


def _path(environment: Mapping[str, str]) -> list[str]:
    """`sys.path` with the PYTHONPATH of another environment."""

    def entries(variables: Mapping[str, str]) -> list[str]:
        return [path for path in variables.get("PYTHONPATH", "").split(os.pathsep) if path]

    before = entries(os.environ)
    return [*entries(environment), *(path for path in sys.path if path not in before)]


def _adapt_libraries() -> None:
    """Do again what libraries did when they were imported, under the variables of now."""
    loaded: Mapping[str, Any] = sys.modules
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if "torch" in loaded and threads.isdecimal():
        loaded["torch"].set_num_threads(int(threads))
    if "numpy" in loaded:
        loaded["numpy"].random.seed()


def _rename(command: Sequence[str]) -> None:
    """Show a command in the list of processes, as far as there is room: `ps` names programs."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = (int(fields[field - 3]) for field in (_ARGUMENTS_START, _ARGUMENTS_END))
    shown = b"\0".join(word.encode() for word in command)[: end - start - 1]
    ctypes.memmove(start, shown.ljust(end - start, b"\0"), end - start)
