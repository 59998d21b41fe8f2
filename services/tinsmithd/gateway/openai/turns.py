"""Turns to read what takes a while: a few at a time, and callers share them evenly by its size."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from tinsmithd.fair_queue import FairQueue
from tinsmithd.gateway.callers import peer


class Turns:
    """Lives on one event loop.

    Args:
        at_once: Turns that are taken at a time.
    """

    def __init__(self, at_once: int) -> None:
        self._free = at_once
        self._queue = FairQueue()

    @contextlib.asynccontextmanager
    async def turn(self, cost: int) -> AsyncIterator[None]:
        """The caller's next turn, for the body of the `with`.

        Args:
            cost: What it costs beside other turns, such as bytes.
        """
        waiter = self._queue.wait(peer(), max(1, cost))
        self._give()
        try:
            await waiter.given
        except asyncio.CancelledError:
            if waiter.given.done() and not waiter.given.cancelled():  # it was given just then
                self._end()
            raise
        try:
            yield
        finally:
            self._end()

    def _end(self) -> None:
        self._free += 1
        self._give()

    def _give(self) -> None:
        while self._free and (waiter := self._queue.next()) is not None:
            self._queue.settle(waiter.name, waiter.cost)
            self._free -= 1
            waiter.given.set_result(None)
