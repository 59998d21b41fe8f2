"""Who is computed: places of one engine, bounded, granted fairly between owners."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from tinsmithd.domain import SampleRequest
from tinsmithd.errors import Reason, ResourceExhausted, quota_exceeded
from tinsmithd.fair_queue import FairQueue, Waiter
from tinsmithd.rates import Rates

RETRY_S = 1.0
"""When a call that found no place may try again."""


@dataclass(frozen=True)
class PlaceLimits:
    """Bounds; the names are those of the settings.

    Attributes:
        tokens_max: Tokens that the engine holds at once, in the worst case; 0: it says nothing.
    """

    running_max: int
    waiting_max: int
    batch_rows_max: int
    tokens_max: int = 0


@dataclass(frozen=True)
class Quota:
    """What one owner may have of a Sampler; 0: no limit.

    Attributes:
        samples_max: Calls that are computed or wait for it.
        tokens_per_minute_max: Tokens, see `Demand`.
    """

    samples_max: int = 0
    tokens_per_minute_max: int = 0


NO_QUOTA = Quota()


@dataclass(frozen=True)
class Demand:
    """What a request takes up while it is computed, in the worst case."""

    sequences: int
    tokens: int
    prompt_tokens: int = 0

    @classmethod
    def of(cls, request: SampleRequest) -> "Demand":
        """Of a checked request: its prompt once, and all new tokens that it may make."""
        new = request.num_samples * request.params.max_tokens
        prompt = len(request.prompt)
        return cls(request.num_samples if new else 1, max(1, prompt + new), prompt)


class Places:
    """Hands out places at one engine, O(log n) each. Lives on one event loop.

    While several owners wait, they get places for the same number of tokens (`FairQueue`),
    however they cut their work into calls. A call that is next waits until there is room for it,
    and nobody overtakes it then: large calls are not starved by small ones. With nothing else under
    way every call has room.

    Attributes:
        running: Calls that have a place.
        sequences, tokens: What they may take up together.
        waiting: Calls that wait for a place.
    """

    def __init__(self, limits: PlaceLimits) -> None:
        self._limits = limits
        self._queue = FairQueue()
        self._demands: dict[Waiter, Demand] = {}
        self._next: Waiter | None = None
        """Taken from the queue, and waits for room."""
        self._waiting_of: Counter[str] = Counter()
        self._calls_of: Counter[str] = Counter()
        self._tokens_of = Rates("tenant_tokens_per_minute_max")
        self.running = self.sequences = self.tokens = 0

    @property
    def waiting(self) -> int:
        """Calls that wait for a place."""
        return len(self._demands)

    @contextlib.contextmanager
    def within(self, owner: str, quota: Quota, demand: Demand) -> Iterator[Callable[[int], None]]:
        """Count a call of an owner for the body of the `with`.

        Yields:
            Takes the number of tokens that were made, of those that the call may make; the others
            are given back at the end.

        Raises:
            ResourceExhausted: The owner has as many calls, or has used as many tokens, as it may
                (QUOTA_EXCEEDED).
            InvalidArgument: The call alone may make too many tokens (LIMIT_EXCEEDED).
        """
        count, most = self._calls_of[owner] + 1, quota.tokens_per_minute_max
        if 0 < quota.samples_max < count:
            raise quota_exceeded("tenant_samples_max", quota.samples_max, count, RETRY_S)
        self._tokens_of.take(owner, demand.tokens, most, "sampling_params.max_tokens")
        self._calls_of[owner] = count
        unused = demand.tokens - demand.prompt_tokens

        def made(tokens: int) -> None:
            nonlocal unused
            unused -= tokens

        try:
            yield made
        finally:
            self._tokens_of.give_back(owner, max(unused, 0), most)
            self._calls_of[owner] -= 1
            if not self._calls_of[owner]:
                del self._calls_of[owner]

    @contextlib.asynccontextmanager
    async def hold(self, owner: str, demand: Demand) -> AsyncIterator[None]:
        """Wait for a place and hold it for the body of the `async with`.

        Args:
            owner: Who asks.
            demand: What it takes up.

        Raises:
            ResourceExhausted: Too many wait already (QUEUE_FULL).
        """
        if self._demands or not self._has_room(demand):
            self._check_waiting(owner)
        waiter = self._queue.wait(owner, demand.tokens)
        self._demands[waiter] = demand
        self._waiting_of[owner] += 1
        self._grant()
        try:
            await waiter.given
        except asyncio.CancelledError:
            if waiter.given.cancelled():
                self._stop_waiting(waiter)
            else:  # it came in the same moment
                self._free(demand)
            self._grant()
            raise
        try:
            yield
        finally:
            self._free(demand)
            self._grant()

    def _has_room(self, demand: Demand) -> bool:
        limits = self._limits
        if not self.running:
            return True
        return (
            self.running < limits.running_max
            and self.sequences + demand.sequences <= limits.batch_rows_max
            and (not limits.tokens_max or self.tokens + demand.tokens <= limits.tokens_max)
        )

    def _grant(self) -> None:
        """Give places while there is room."""
        while (waiter := self._next or self._queue.next()) is not None:
            self._next = None
            if waiter.given.done():  # it left
                self._queue.settle(waiter.name, 0)
                continue
            demand = self._demands[waiter]
            if not self._has_room(demand):
                self._next = waiter
                return
            self._queue.settle(waiter.name, waiter.cost)
            self._stop_waiting(waiter)
            self.running += 1
            self.sequences += demand.sequences
            self.tokens += demand.tokens
            waiter.given.set_result(None)

    def _stop_waiting(self, waiter: Waiter) -> None:
        del self._demands[waiter]
        self._waiting_of[waiter.name] -= 1
        if not self._waiting_of[waiter.name]:
            del self._waiting_of[waiter.name]

    def _free(self, demand: Demand) -> None:
        self.running -= 1
        self.sequences -= demand.sequences
        self.tokens -= demand.tokens

    def _check_waiting(self, owner: str) -> None:
        """Refuse where too many wait; who has less than a fair share of the queue is let in."""
        owners = len(self._waiting_of.keys() | {owner})
        share = self._limits.waiting_max // owners
        if self.waiting >= self._limits.waiting_max and self._waiting_of[owner] >= share:
            raise full(self._limits.waiting_max, self.waiting)


def full(waiting_max: int, waiting: int) -> ResourceExhausted:
    """The refusal of a call where so many wait already (QUEUE_FULL)."""
    return ResourceExhausted(
        f"waiting_max = {waiting_max} calls wait already",
        Reason.QUEUE_FULL,
        retry_after_s=RETRY_S,
        metadata={"limit": "waiting_max", "value": str(waiting + 1)},
    )
