"""Who uses the ranks next: turns that share them evenly by what each turn costs.

Start-time fair queueing (Goyal, Vin and Cheng, "Start-time Fair Queuing", SIGCOMM 1996). Each
model has an account of the tokens that it used. On a clock that counts tokens, a turn starts where
its model's account stands, or now where the account lies behind: nobody saves up credit by asking
for nothing. The turn that starts first comes first; of two that start together, the cheaper.

While two models both wait, what they got differs by no more than their largest turns together. A
new model starts now: at most the turn under way and one turn of each other model come before it.
"""

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

PURGE_MIN = 64
"""Number of accounts below which nobody looks for old ones."""


class _Waiter:
    """One turn that somebody waits for; `given` is done once it is given, or given up."""

    def __init__(self, cost: int) -> None:
        self.cost = cost
        self.given: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Turns:
    """Hands out one turn at a time, O(log n) each; it knows nothing of idle models.

    Lives on one event loop.
    """

    def __init__(self) -> None:
        # By name: first the turn that is offered or held, then those behind it in order.
        self._queues: dict[str, deque[_Waiter]] = {}
        # A heap of offers: (start, end, arrival, name, waiter).
        self._offers: list[tuple[int, int, int, str, _Waiter]] = []
        self._arrivals = itertools.count()
        self._accounts: dict[str, int] = {}
        self._purge_at = PURGE_MIN
        self._now = 0
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
        waiter = _Waiter(cost)
        queue = self._queues.setdefault(name, deque())
        queue.append(waiter)
        if len(queue) == 1:
            self._offer(name)
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

    def _offer(self, name: str) -> None:
        """Let the first waiter of this name compete for the turn."""
        queue = self._queues[name]
        while queue and queue[0].given.done():
            queue.popleft()
        if not queue:
            del self._queues[name]
            return
        start = max(self._now, self._accounts.get(name, 0))
        offer = (start, start + queue[0].cost, next(self._arrivals), name, queue[0])
        heapq.heappush(self._offers, offer)

    def _release(self, name: str, cost: int) -> None:
        if cost:
            self._accounts[name] = self._now + cost
        self._queues[name].popleft()
        self._offer(name)
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
        while self._offers:
            start, _, _, name, waiter = heapq.heappop(self._offers)
            if waiter.given.done():  # cancelled
                self._offer(name)
                continue
            self._now = start
            self._held = True
            waiter.given.set_result(None)
            self._purge()
            return
        # Nobody waits: nobody is owed anything.
        self._accounts.clear()
        self._purge_at = PURGE_MIN
        self._now = 0

    def _purge(self) -> None:
        # An account that lies behind equals none; doubling makes this O(1) in the long run.
        if len(self._accounts) > self._purge_at:
            self._accounts = {n: used for n, used in self._accounts.items() if used > self._now}
            self._purge_at = max(PURGE_MIN, 2 * len(self._accounts))
