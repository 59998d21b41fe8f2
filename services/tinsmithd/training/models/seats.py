"""Which models are at the ranks: several adapters, or one model that trains all weights.

A model at the ranks has a seat. A model that needs one waits in a queue; when none is free, the
model that was idle longest is suspended: its state is on disk already, except for the calls after
its last snapshot, and its next call brings it back. A model in use keeps its seat for a while, so
that two that take turns do not send each other away with every call.

Where nothing is on disk, no model can be suspended: a model that finds no seat is refused.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tinsmithd.errors import FailedPrecondition, Reason, ResourceExhausted, TinsmithError
from tinsmithd.training.models.model import Model

POLL_S = 0.05
"""Between two looks whether a model became idle, while others wait."""
GRADIENTS_IDLE_S = 60.0
"""A model with pending gradients that was idle for less than this is suspended after others: its
return has to compute them again."""
LEAVE_S = 5.0
"""A model that was asked to leave and has not done so for so long is in a long call: ask others."""
HOW_TO_DELETE = "TrainingClient.delete(), RestClient.delete_model(model_id) or the DeleteModel call"


@dataclass(frozen=True)
class SeatLimits:
    """The names are those of the settings."""

    models_max: int
    suspend_idle_s: float = 0.0
    suspend_busy_s: float = 0.0


@dataclass(eq=False)
class _Seat:
    """The seat of one model. Times are the loop's.

    Attributes:
        since_s: When the model got it, or came back to it.
        returning: Whether the model is being brought back.
        asked_s: When the model was asked to leave; None while it was not.
    """

    model: Model
    since_s: float
    returning: bool = False
    asked_s: float | None = None


@dataclass(eq=False)
class _Waiter:
    model: Model
    given: "asyncio.Future[None]"


class Seats:
    """Hands out seats at the ranks. Lives on one event loop.

    Args:
        limits: Number of seats, and how long models keep them.
        suspends: Whether models can be suspended.
        free: Makes the ranks drop a model that is lost, and then calls `leave`.
    """

    def __init__(
        self, limits: SeatLimits, *, suspends: bool, free: Callable[[Model], object]
    ) -> None:
        self._limits = limits
        self._suspends = suspends
        self._free = free
        self._seats: dict[str, _Seat] = {}
        self._waiting: deque[_Waiter] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def __contains__(self, model: Model) -> bool:
        return model.model_id in self._seats

    async def enter(self, model: Model) -> None:
        """Wait for a seat; a model that has one keeps it.

        Raises:
            ResourceExhausted: There is none, and there will be none (TOO_MANY_MODELS).
            FailedPrecondition: A model that trains all weights is, or would be, not alone
                (RANK_GROUP_TAKEN).
            TinsmithError: The model was deleted meanwhile.
        """
        if model in self:
            return
        if not self._suspends:
            self._check(model)
            self._give(model)
            return
        waiter = _Waiter(model, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        self._decide()
        try:
            await waiter.given
        except asyncio.CancelledError:
            if not waiter.given.cancelled():  # it got one in the same moment
                self.leave(model)
            raise

    def leave(self, model: Model) -> None:
        """A model is not at the ranks any more; no effect where it was not."""
        if self._seats.pop(model.model_id, None) is not None:
            self._decide()

    def is_back(self, model: Model) -> None:
        """A model came back to its seat; its time there begins now."""
        seat = self._seats.get(model.model_id)
        if seat is not None:
            seat.since_s, seat.returning = asyncio.get_running_loop().time(), False

    def give_up(self, model: Model, error: TinsmithError) -> None:
        """A model is gone: its caller hears that if it waits for a seat."""
        for waiter in self._waiting:
            if waiter.model is model and not waiter.given.done():
                waiter.given.set_exception(error)

    def give_up_creations(self, error: TinsmithError) -> None:
        """The process ends: whoever creates a model and waits for its seat hears it."""
        for waiter in self._waiting:
            if not waiter.model.created:
                self.give_up(waiter.model, error)

    def seat_at_once(self, models: Iterable[Model]) -> None:
        """After a start: give seats to the first of these models, as far as there are any."""
        for model in models:
            if self._fits(model):
                self._give(model)

    # --- who gets one -------------------------------------------------------------------------

    def _give(self, model: Model) -> None:
        now_s = asyncio.get_running_loop().time()
        self._seats[model.model_id] = _Seat(model, now_s, returning=model.created)

    def _fits(self, model: Model) -> bool:
        if model.is_alone:
            return not self._seats
        return len(self._seats) < self._limits.models_max and not self._owned

    @property
    def _owned(self) -> bool:
        """Whether one model has all seats."""
        return any(seat.model.is_alone for seat in self._seats.values())

    def _check(self, model: Model) -> None:
        self._seats = {k: seat for k, seat in self._seats.items() if not _lost(seat.model)}
        if self._fits(model):
            return
        why = 'with durability "none" no model can be suspended'
        if model.is_alone or self._owned:
            raise FailedPrecondition(
                "a model that trains all weights owns the rank group, and there are "
                f"{len(self._seats)} other model(s); {why}: delete them first, by {HOW_TO_DELETE}",
                Reason.RANK_GROUP_TAKEN,
            )
        raise too_many_models("models_max", self._limits.models_max, f"; {why}")

    def _decide(self) -> None:
        while self._waiting:
            waiter = self._waiting[0]
            if not waiter.given.done():
                if not self._fits(waiter.model):
                    break
                self._give(waiter.model)
                waiter.given.set_result(None)
            self._waiting.popleft()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting:
            self._make_room()
            self._timer = asyncio.get_running_loop().call_later(POLL_S, self._decide)

    def _make_room(self) -> None:
        """Let models leave whose seats others need, as far as they can be spared."""
        now_s = asyncio.get_running_loop().time()
        for seat in list(self._seats.values()):
            if _lost(seat.model) and seat.asked_s is None:
                seat.asked_s = now_s
                self._free(seat.model)
        asked = [seat.asked_s for seat in self._seats.values() if seat.asked_s is not None]
        leaving = sum(now_s - asked_s < LEAVE_S for asked_s in asked)
        needed = len(self._seats) - leaving
        if not (self._waiting[0].model.is_alone or self._owned):
            # Room for the first that wait, up to one that needs all seats.
            wanted = 0
            for waiter in self._waiting:
                if waiter.model.is_alone:
                    break
                wanted += 1
            needed = min(needed, needed + wanted - self._limits.models_max)
        spared = [seat for seat in self._seats.values() if self._can_be_spared(seat, now_s)]
        spared.sort(key=lambda seat: self._order(seat, now_s))
        for seat in spared[: max(needed, 0)]:
            seat.asked_s = now_s
            seat.model.lane.suspend()

    def _can_be_spared(self, seat: _Seat, now_s: float) -> bool:
        if seat.asked_s is not None or not seat.model.created:
            return False
        if seat.returning and not seat.model.lane.blocked:
            return False
        if now_s - seat.since_s >= self._limits.suspend_busy_s:
            return True
        idle_s = now_s - self._idle_since_s(seat)
        return seat.model.lane.idle and idle_s >= self._limits.suspend_idle_s

    @staticmethod
    def _idle_since_s(seat: _Seat) -> float:
        return max(seat.since_s, seat.model.lane.idle_since_s)

    def _order(self, seat: _Seat, now_s: float) -> tuple[bool, bool, float]:
        lane, since_s = seat.model.lane, self._idle_since_s(seat)
        costly = lane.executor.has_gradients and now_s - since_s < GRADIENTS_IDLE_S
        return not lane.idle, costly, since_s


def _lost(model: Model) -> bool:
    return model.created and model.lane.lost


def too_many_models(limit: str, most: int, why: str = "") -> ResourceExhausted:
    """The error of one model too many."""
    return ResourceExhausted(
        f"{limit} is {most}{why}; delete one: {HOW_TO_DELETE}",
        Reason.TOO_MANY_MODELS,
        metadata={"limit": limit, "value": str(most + 1)},
    )
