"""Who has a seat at the ranks, who has to leave, and what is said where nobody can."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from tinsmithd.domain import BaseModelInfo, FullConfig, LoraConfig, Tuning
from tinsmithd.errors import FailedPrecondition, NotFound, Reason, ResourceExhausted
from tinsmithd.training.models import seats as module
from tinsmithd.training.models.model import Model
from tinsmithd.training.models.seats import SeatLimits, Seats

INFO = BaseModelInfo("base", "llama", 10, 10, "float32", 1, 1)


class Room:
    """Seats, and models whose lanes leave as soon as they are asked and are not busy."""

    def __init__(self, models_max: int, *, idle_s: float = 0.0, busy_s: float = 60.0) -> None:
        limits = SeatLimits(models_max, idle_s, busy_s)
        self.freed: list[str] = []
        self.seats = Seats(limits, suspends=True, free=self._free)
        self.left: list[str] = []
        self._models: list[Model] = []

    def _free(self, model: Model) -> None:
        self.freed.append(model.model_id)
        asyncio.get_running_loop().call_soon(self.seats.leave, model)

    def model(self, name: str, tuning: Tuning | None = None) -> Model:
        found = Model(name, INFO, tuning or LoraConfig(), {}, 1, {})
        lane: Any = SimpleNamespace(
            idle=True,
            idle_since_s=0.0,
            lost=False,
            blocked=False,
            executor=SimpleNamespace(has_gradients=False),
        )
        lane.suspend = lambda: self._leave(found)
        found.lane = lane
        return found

    def _leave(self, model: Model) -> None:
        async def leave() -> None:
            while not model.lane.idle:
                await asyncio.sleep(0.001)
            self.left.append(model.model_id)
            self.seats.leave(model)

        self._leaving = asyncio.create_task(leave())

    async def enter(self, model: Model) -> None:
        await asyncio.wait_for(self.seats.enter(model), 30)
        self.seats.is_back(model)


def used(model: Model) -> None:
    """Its last call ends just now."""
    model.lane.idle_since_s = asyncio.get_running_loop().time()


async def full_room() -> tuple[Room, Model]:
    """Two seats, taken by the model that is returned and then by another one, "b"."""
    room = Room(2)
    first = room.model("a")
    for model in (first, room.model("b")):
        await room.enter(model)
        await asyncio.sleep(0.002)
    return room, first


async def test_the_model_that_was_idle_longest_leaves() -> None:
    """Not the one that came first."""
    room, first = await full_room()
    used(first)
    await room.enter(room.model("c"))
    assert room.left == ["b"]
    await room.enter(first)
    assert room.left == ["b"]


async def test_a_model_with_pending_gradients_leaves_after_others() -> None:
    """Unless there is no other."""
    room, first = await full_room()
    third = room.model("c")
    first.lane.executor.has_gradients = True  # type: ignore[misc]
    await room.enter(third)
    assert room.left == ["b"]
    third.lane.executor.has_gradients = True  # type: ignore[misc]
    await room.enter(room.model("d"))
    assert room.left == ["b", "a"]


async def test_a_model_in_use_keeps_its_seat_for_a_while() -> None:
    """It is spared until it was idle for long enough, or there for long enough."""
    room = Room(1, idle_s=0.2, busy_s=60)
    first = room.model("a")
    start_s = asyncio.get_running_loop().time()
    await room.enter(first)
    await room.enter(room.model("b"))
    assert asyncio.get_running_loop().time() - start_s >= 0.2
    room = Room(1, idle_s=60, busy_s=0.2)
    first = room.model("a")
    await room.enter(first)
    first.lane.idle = False  # type: ignore[misc]
    waiting = asyncio.create_task(room.enter(room.model("b")))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    first.lane.idle = True  # type: ignore[misc]
    await waiting
    assert room.left == ["a"]


async def test_a_model_on_its_way_back_is_not_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the way is, unless the ranks that there are cannot take it."""
    room = Room(1, busy_s=0.0)
    first = room.model("a")
    await room.seats.enter(first)
    waiting = asyncio.create_task(room.enter(room.model("b")))
    await asyncio.sleep(0.2)
    assert room.left == []
    first.lane.blocked = True  # type: ignore[misc]
    await waiting
    assert room.left == ["a"]


async def test_a_model_in_a_long_call_does_not_keep_others_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where it was asked to leave and cannot yet, another one is."""
    monkeypatch.setattr(module, "LEAVE_S", 0.2)
    room = Room(2, busy_s=0.0)
    first, second = room.model("a"), room.model("b")
    for model in (first, second):
        model.lane.idle = False  # type: ignore[misc]
        await room.enter(model)
    waiting = asyncio.create_task(room.enter(room.model("c")))
    await asyncio.sleep(0.05)
    second.lane.idle = True  # type: ignore[misc]
    await waiting
    assert room.left == ["b"]


async def test_a_model_that_trains_all_weights_is_alone() -> None:
    """The others leave for it, and it for them; who comes later waits for who came before."""
    room = Room(2)
    first, second = room.model("a"), room.model("b")
    full = room.model("full", FullConfig())
    await room.enter(first)
    await room.enter(second)
    await asyncio.gather(room.enter(full), room.enter(room.model("c")))
    assert sorted(room.left) == ["a", "b", "full"]
    await asyncio.gather(room.enter(first), room.enter(full))
    assert full in room.seats
    assert first not in room.seats


async def test_who_is_deleted_while_waiting_hears_of_it_and_leaves_no_gap() -> None:
    """Whether its task is cancelled or its model is gone."""
    room = Room(1)
    first = room.model("a")
    await room.enter(first)
    first.lane.idle = False  # type: ignore[misc]
    gone, cancelled, last = (room.model(name) for name in "bcd")
    tasks = [asyncio.create_task(room.enter(model)) for model in (gone, cancelled, last)]
    await asyncio.sleep(0.01)
    room.seats.give_up(gone, NotFound("gone", Reason.MODEL_NOT_FOUND))
    tasks[1].cancel()
    with pytest.raises(NotFound):
        await tasks[0]
    first.lane.idle = True  # type: ignore[misc]
    await tasks[2]
    assert last in room.seats


async def test_a_lost_model_gives_its_seat_up() -> None:
    """After the ranks dropped what they have of it."""
    room = Room(1)
    first = room.model("a")
    await room.enter(first)
    first.lane.lost = True  # type: ignore[misc]
    await room.enter(room.model("b"))
    assert (room.freed, room.left) == (["a"], [])


async def test_where_nothing_can_be_suspended_the_error_names_the_calls_to_make() -> None:
    """With durability "none": at once, for one too many and for one that must be alone."""
    seats = Seats(SeatLimits(1), suspends=False, free=lambda model: None)
    room = Room(1)
    first = room.model("a")
    await seats.enter(first)
    with pytest.raises(ResourceExhausted, match="models_max is 1") as many:
        await seats.enter(room.model("b"))
    with pytest.raises(FailedPrecondition) as taken:
        await seats.enter(room.model("full", FullConfig()))
    assert (many.value.reason, taken.value.reason) == (
        Reason.TOO_MANY_MODELS,
        Reason.RANK_GROUP_TAKEN,
    )
    for refusal in (many.value, taken.value):
        for call in ("TrainingClient.delete()", "RestClient.delete_model(", "DeleteModel"):
            assert call in refusal.message
    seats.leave(first)
    await seats.enter(room.model("b"))
