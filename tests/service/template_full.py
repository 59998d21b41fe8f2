"""Imported by a template of `test_template`: its second fork finds no room for a process, and the
one after that no descriptor to watch the process by, when the process has gone as far as it can."""

import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def _failing(call: Callable[..., Any], fails: Iterator[bool], number: int) -> Callable[..., Any]:
    def do(*arguments: Any) -> Any:
        if next(fails, False):
            while arguments and not _sleeps(arguments[0]):
                time.sleep(0.001)
            raise OSError(number, os.strerror(number))
        return call(*arguments)

    return do


def _sleeps(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


os.fork = _failing(os.fork, iter([False, True]), errno.EAGAIN)
os.pidfd_open = _failing(os.pidfd_open, iter([False, True]), errno.EMFILE)
