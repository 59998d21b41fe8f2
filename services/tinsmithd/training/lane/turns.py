"""Who uses the ranks next: one turn at a time, shared evenly by tokens (`FairQueue`).

While two models both wait, what they got differs by no more than their largest turns together. A
new model starts now: at most the turn under way and one turn of each other model come before it.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tinsmithd.fair_queue import FairQueue


class Turns:
    """Hands out one turn at a time, O(log n) each; it knows nothing of idle models.

    Lives on one event loop.
    """

    def __init__(self) -> None:
        self._queue = FairQueue()
        self._held = False
        self._deciding = False

    @asynccontextmanager
    async def take(self, name: str, cost: int) -> AsyncIterator[None]:
        """Wait for a turn and hold it for the body of the `async with`.

        A task that asks again before it suspends competes as if it had never stopped waiting.

        Args:
            name: Whose account pays. Turns of one name come in the order of their requests.
            cost: Tokens, at least 1.
        """
        waiter = self._queue.wait(name, cost)
        self._decide_soon()
        try:
            await waiter.given
        except asyncio.CancelledError:
            if not waiter.given.cancelled():  # it came in the same moment: pass it on, unused
                self._release(name, 0)
            raise
        try:
            yield
        finally:
            self._release(name, cost)

    def _release(self, name: str, cost: int) -> None:
        self._queue.settle(name, cost)
        self._held = False
        self._decide_soon()

    def _decide_soon(self) -> None:
        # Not at once: a task that just had a turn may be about to ask for the next one, and must
        # not lose it for the lines of code in between.
        if not self._held and not self._deciding:
            self._deciding = True
            asyncio.get_running_loop().call_soon(self._decide)

    def _decide(self) -> None:
        self._deciding = False
        waiter = self._queue.next()
        if waiter is not None:
            self._held = True
            waiter.given.set_result(None)
