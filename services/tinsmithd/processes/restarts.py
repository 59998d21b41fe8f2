"""Programs that are started again when they end: after which pause, and how one is ended."""

import asyncio
import contextlib
import os
import signal

from tinsmithd.processes import template

PAUSE_S_FIRST = 0.1
PAUSE_S_MAX = 30.0
STOP_S_MAX = 10.0
SETTLED_S = 3.0
"""A program that lived for so long starts again without delay."""


class Pauses:
    """The pauses before one program's starts: ever longer ones, unless it lived for a while."""

    def __init__(self) -> None:
        self._next_s = PAUSE_S_FIRST

    def after(self, lived_s: float) -> float:
        """The pause, in seconds, after the program lived for so long."""
        if lived_s > self._next_s + SETTLED_S:
            self._next_s = PAUSE_S_FIRST
        pause_s = self._next_s
        self._next_s = min(2 * pause_s, PAUSE_S_MAX)
        return pause_s


async def stop(program: template.Program) -> None:
    """End a program and its children: politely, or else at once."""
    if program.returncode is not None:
        return
    program.send_signal(signal.SIGTERM)
    try:
        await asyncio.wait_for(program.wait(), STOP_S_MAX)
    except TimeoutError:
        kill(program)
        await program.wait()


def kill(program: template.Program) -> None:
    """End a program at once, with its children: they are in its process group."""
    if program.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
