"""Imported by a template of `test_template`: its second fork finds no room for a process, and the
one after that no descriptor to watch the process by."""

import errno
import os
from collections.abc import Callable, Iterator
from typing import Any


def _failing(call: Callable[..., Any], fails: Iterator[bool], number: int) -> Callable[..., Any]:
    def do(*arguments: Any) -> Any:
        if next(fails, False):
            raise OSError(number, os.strerror(number))
        return call(*arguments)

    return do


os.fork = _failing(os.fork, iter([False, True]), errno.EAGAIN)
os.pidfd_open = _failing(os.pidfd_open, iter([False, True]), errno.EMFILE)
