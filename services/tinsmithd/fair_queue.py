"""Who is next: turns that share something evenly by what each turn costs.

Start-time fair queueing (Goyal, Vin and Cheng, "Start-time Fair Queuing", SIGCOMM 1996). Each name
has an account of what it used. On a clock that counts cost, a turn starts where its name's account
stands, or now where the account lies behind: nobody saves up credit by asking for nothing. The turn
that starts first comes first; of two that start together, the cheaper.

While two names both wait, what they got differs by no more than their largest turns together. A new
name starts now: at most one turn of each other name comes before it.
"""

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Callable

PURGE_MIN = 64
"""Number of accounts below which nobody looks for old ones."""


class Waiter:
    """One turn that somebody waits for; `given` is done once it is given, or given up.

    Attributes:
        name: Whose account pays.
        cost: What the turn costs, at least 1.
    """

    def __init__(self, name: str, cost: int) -> None:
        self.name, self.cost = name, cost
        self.given: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class FairQueue:
    """The order of turns, O(log n) each; it knows nothing of idle names. Lives on one event loop.

    Turns of one name come in the order of their requests, one at a time: after `next` gave one of
    them, the name competes again with `settle`.
    """

    def __init__(self) -> None:
        # By name: first the turn that is offered or was given, then those behind it in order.
        self._queues: dict[str, deque[Waiter]] = {}
        # A heap of offers: (start, end, arrival, waiter).
        self._offers: list[tuple[int, int, int, Waiter]] = []
        self._arrivals = itertools.count()
        self._accounts: dict[str, int] = {}
        self._purge_at = PURGE_MIN
        self._now = 0

    def __len__(self) -> int:
        """Number of names that it knows of."""
        return len(self._queues.keys() | self._accounts.keys())

    @property
    def waits(self) -> bool:
        """Whether a turn is waited for, or was given."""
        return bool(self._queues)

    def wait(self, name: str, cost: int) -> Waiter:
        """Line up for a turn; whoever cancels `given` has left."""
        waiter = Waiter(name, cost)
        queue = self._queues.setdefault(name, deque())
        queue.append(waiter)
        if len(queue) == 1:
            self._offer(name)
        return waiter

    def next(self) -> Waiter | None:
        """The turn that comes now; None where nobody waits."""
        while self._offers:
            start, _, _, waiter = heapq.heappop(self._offers)
            if waiter.given.done():  # cancelled
                self._offer(waiter.name)
                continue
            self._now = start
            self._purge()
            return waiter
        # Nobody waits: nobody is owed anything.
        self._accounts.clear()
        self._purge_at = PURGE_MIN
        self._now = 0
        return None

    def settle(self, name: str, cost: int) -> None:
        """Charge a name for the turn that `next` gave it; 0: it was not used."""
        if cost:
            self._accounts[name] = self._now + cost
        self._queues[name].popleft()
        self._offer(name)

    def _offer(self, name: str) -> None:
        """Let the first waiter of this name compete."""
        queue = self._queues[name]
        while queue and queue[0].given.done():
            queue.popleft()
        if not queue:
            del self._queues[name]
            return
        start = max(self._now, self._accounts.get(name, 0))
        offer = (start, start + queue[0].cost, next(self._arrivals), queue[0])
        heapq.heappush(self._offers, offer)

    def _purge(self) -> None:
        # An account that lies behind equals none; doubling makes this O(1) in the long run.
        if len(self._accounts) > self._purge_at:
            self._accounts = {n: used for n, used in self._accounts.items() if used > self._now}
            self._purge_at = max(PURGE_MIN, 2 * len(self._accounts))


class NestedQueue:
    """Turns that owners share evenly, and within each owner the names that are his.

    Both are `FairQueue`s: however many names an owner has, they get what one owner gets. With one
    owner alone the order is that of a `FairQueue` of his names.
    """

    def __init__(self) -> None:
        self._owners = FairQueue()
        self._names: dict[str, FairQueue] = {}
        self._purge_at = PURGE_MIN

    def __len__(self) -> int:
        """Number of names that it knows of."""
        return sum(map(len, self._names.values()))

    def wait(self, owner: str, name: str, cost: int) -> Waiter:
        """Line up for a turn; whoever cancels `given` has left."""
        self._owners.wait(owner, cost)  # one for each: whose turn it is, is then seen
        return self._names.setdefault(owner, FairQueue()).wait(name, cost)

    def next(self) -> Waiter | None:
        """The turn that comes now; None where nobody waits."""
        if len(self._names) > self._purge_at:
            self._forget(lambda names: not names.waits)
            self._purge_at = max(PURGE_MIN, 2 * len(self._names))
        while (offered := self._owners.next()) is not None:
            waiter = self._names[offered.name].next()
            if waiter is not None:
                return waiter
            self._owners.settle(offered.name, 0)  # whoever lined up for it has left
        for names in self._names.values():
            names.next()  # nobody waits: nobody is owed anything
        self._forget(lambda names: not len(names))
        return None

    def _forget(self, gone: Callable[[FairQueue], bool]) -> None:
        self._names = {owner: names for owner, names in self._names.items() if not gone(names)}

    def settle(self, owner: str, name: str, cost: int) -> None:
        """Charge both for the turn that `next` gave; 0: it was not used."""
        self._names[owner].settle(name, cost)
        self._owners.settle(owner, cost)
