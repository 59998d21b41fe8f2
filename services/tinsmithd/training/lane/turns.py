"""Who uses the ranks next: one turn at a time, shared evenly by tokens (`NestedQueue`).

While two owners both wait, what they got differs by no more than their largest turns together, and
so it is with two models of one owner. One that is new starts now: at most the turn under way, and
one turn of each other owner and of each other model of its own, come before it.
"""

import asyncio
from collections.abc import Callable

from tinsmithd import tracing
from tinsmithd.fair_queue import NestedQueue, Waiter
from tinsmithd.owners import owner_of


class Turns:
    """Hands out one turn at a time, O(log n) each; it knows nothing of idle models.

    Lives on one event loop.
    """

    def __init__(self) -> None:
        self._queue = NestedQueue()
        self._held = False
        self._deciding = False

    def take(self, name: str, cost: int, check: Callable[[], None] = lambda: None) -> "Turn":
        """Wait for a turn and hold it for the body of the `async with`.

        A task that asks again before it suspends competes as if it had never stopped waiting.

        Args:
            name: Whose account pays: a model's id as it is inside, which says whose it is. Turns of
                one name come in the order of their requests.
            cost: Tokens, at least 1.
            check: Called once it has come; what it raises gives the turn back, unused.
        """
        return Turn(self, name, cost, check)

    def wait(self, name: str, cost: int) -> Waiter:
        """Line up; for `Turn` alone, which calls `release` once it was given."""
        waiter = self._queue.wait(owner_of(name), name, cost)
        self._decide_soon()
        return waiter

    def release(self, name: str, cost: int) -> None:
        """A turn is over."""
        self._queue.settle(owner_of(name), name, cost)
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


class Turn:
    """One turn at the ranks, see `Turns.take`."""

    def __init__(self, turns: Turns, name: str, cost: int, check: Callable[[], None]) -> None:
        self._turns = turns
        self._name, self._cost = name, cost
        self._check = check

    async def __aenter__(self) -> None:
        waiter = self._turns.wait(self._name, self._cost)
        since_ns = tracing.now_ns()
        try:
            await waiter.given
            tracing.interval("turn", since_ns, tokens=self._cost)
            self._check()
        except BaseException:
            if waiter.given.done() and not waiter.given.cancelled():
                # It came in the moment in which nobody wanted it any more: pass it on, unused.
                self._turns.release(self._name, 0)
            raise

    async def __aexit__(self, *_: object) -> None:
        self._turns.release(self._name, self._cost)
