"""Turns at the ranks: order, shares and waits, counted in turns and tokens."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterable

import pytest

from tinsmithd.fair_queue import PURGE_MIN
from tinsmithd.owners import DEFAULT_OWNER
from tinsmithd.training.lane.turns import Turns


class Ranks:
    """What models did with their turns: who, and at what cost, in order."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.taken: list[tuple[str, int]] = []
        self.busy = False

    async def use(self, name: str, costs: Iterable[int]) -> None:
        """Take a turn after the other, asking for the next as soon as one ends."""
        for cost in costs:
            await self.use_once(name, cost)

    async def use_once(self, name: str, cost: int) -> None:
        async with self.turns.take(name, cost):
            assert not self.busy
            self.busy = True
            self.taken.append((name, cost))
            try:
                await asyncio.sleep(0)
            finally:
                self.busy = False

    async def begin(self, name: str, cost: int) -> asyncio.Task[None]:
        """Let a model ask; returns once it has asked."""
        task = asyncio.create_task(self.use_once(name, cost))
        await asyncio.sleep(0)
        return task

    def tokens(self, turns: int | None = None) -> Counter[str]:
        """Tokens of each model in its first so many turns, or in all."""
        used: Counter[str] = Counter()
        for name, cost in self.taken[:turns]:
            used[name] += cost
        return used


def jain(values: Iterable[int]) -> float:
    """Jain's index: 1 where all are equal, 1 / n where one has everything."""
    found = list(values)
    return sum(found) ** 2 / (len(found) * sum(value**2 for value in found))


def knows_nobody(turns: Turns) -> bool:
    return not (len(turns._queue) or turns._queue._names or turns._held)


async def test_one_holds_the_turn_at_a_time_and_a_name_keeps_its_order() -> None:
    """`use_once` checks the first; turns of one name come as they were asked for."""
    ranks = Ranks()
    await asyncio.gather(*(ranks.use_once("a", cost) for cost in (5, 1, 3, 2)))
    assert ranks.taken == [("a", cost) for cost in (5, 1, 3, 2)]


async def test_equals_alternate() -> None:
    """Turns of one size go round."""
    ranks = Ranks()
    await asyncio.gather(*(ranks.use(name, [7] * 4) for name in "abc"))
    assert [name for name, _ in ranks.taken] == list("abc" * 4)


COSTS: dict[str, Callable[[random.Random], int]] = {
    "large": lambda _: 16384,
    "almost": lambda rng: rng.randint(14000, 16384),
    "mixed": lambda rng: rng.randint(1, 16384),
    "small": lambda rng: rng.randint(1, 300),
    "tiny": lambda _: 100,
    "longer than a part": lambda _: 32768,
}


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_the_size_of_their_turns_models_get_the_same_tokens(seed: int) -> None:
    """While all wait, any two differ by no more than their largest turns together; Jain's index
    of their tokens comes to 1."""
    ranks, rng = Ranks(), random.Random(seed)
    total = 1_000_000
    costs: dict[str, list[int]] = {}
    for name, draw in COSTS.items():
        costs[name], queued = [], 0
        while queued < total:
            costs[name].append(draw(rng))
            queued += costs[name][-1]
    largest = {name: max(list_) for name, list_ in costs.items()}
    await asyncio.gather(*(ranks.use(name, list_) for name, list_ in costs.items()))
    left, used = {name: len(list_) for name, list_ in costs.items()}, Counter[str]()
    for name, cost in ranks.taken:
        used[name] += cost
        left[name] -= 1
        if not left[name]:
            break  # from here on not all of them wait
        for a in costs:
            for b in costs:
                assert used[a] - used[b] <= largest[a] + largest[b]
    assert sum(used.values()) > 0.9 * total * len(costs)
    assert jain(used.values()) > 0.999


@pytest.mark.parametrize("seed", range(5))
async def test_a_newcomer_waits_for_at_most_one_turn_of_each_other(seed: int) -> None:
    """However much the others have queued, and whatever they used before."""
    ranks, rng = Ranks(), random.Random(seed)
    names = [f"busy {n}" for n in range(8)]
    busy = [
        asyncio.create_task(ranks.use(name, [rng.randint(1, 1000) for _ in range(200)]))
        for name in names
    ]
    for visit in range(20):
        for _ in range(rng.randint(1, 60)):
            await asyncio.sleep(0)
        asked = len(ranks.taken)
        await ranks.use_once(f"new {visit}", 10)
        before = ranks.taken[asked - 1 :]  # with the one under way
        waited = Counter(name for name, _ in before)
        del waited[f"new {visit}"]
        assert max(waited.values()) <= 2  # the turn under way, and one more
        assert sum(waited.values()) <= 1 + len(names)
    assert not any(task.done() for task in busy)
    await asyncio.gather(*busy)


async def test_a_light_model_goes_before_heavy_ones_that_start_with_it() -> None:
    """Equal claims: the cheaper turn first, so that it waits for the turn under way alone."""
    ranks = Ranks()
    busy = [asyncio.create_task(ranks.use(name, [1000] * 5)) for name in "abc"]
    while len(ranks.taken) < 4:
        await asyncio.sleep(0)
    await ranks.use_once("light", 10)
    assert [name for name, _ in ranks.taken[:5]] == ["a", "b", "c", "a", "light"]
    await asyncio.gather(*busy)


async def test_who_asked_for_nothing_has_saved_nothing() -> None:
    """A model that comes back shares evenly from then on; it does not catch up."""
    ranks = Ranks()
    await ranks.use_once("back", 1)
    busy = asyncio.create_task(ranks.use("busy", [10] * 60))
    while len(ranks.taken) < 50:
        await asyncio.sleep(0)
    seen = len(ranks.taken)
    await ranks.use("back", [10] * 5)
    between = [name for name, _ in ranks.taken[seen:]]
    assert between.count("busy") >= 4
    await busy


async def test_a_cancelled_waiter_neither_gets_nor_loses_the_turn() -> None:
    """Waiting at the front, in the middle and behind its own name."""
    ranks = Ranks()
    asked = [
        await ranks.begin(name, cost) for name, cost in zip("abacd", [9, 1, 9, 2, 3], strict=True)
    ]
    for index in (1, 2, 3):
        asked[index].cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    assert [name for name, _ in ranks.taken] == ["a", "d"]
    assert [task.cancelled() for task in asked] == [False, True, True, True, False]
    await ranks.use_once("b", 1)
    await asyncio.sleep(0)
    assert knows_nobody(ranks.turns)


async def test_a_turn_given_to_a_task_that_is_cancelled_at_once_is_passed_on() -> None:
    """Between being given the turn and running on, a task can be cancelled."""
    turns = Turns()
    taken: list[str] = []

    async def use(name: str) -> None:
        async with turns.take(name, 5):
            taken.append(name)

    tasks = {}
    async with turns.take("holder", 1):
        for name in "ab":
            tasks[name] = asyncio.create_task(use(name))
        await asyncio.sleep(0)
    # The next step of the loop gives the turn away; this callback comes right behind it, and
    # before the task that was given the turn.
    asyncio.get_running_loop().call_soon(tasks["a"].cancel)
    await asyncio.gather(*tasks.values(), return_exceptions=True)
    assert tasks["a"].cancelled()
    assert taken == ["b"]
    await asyncio.sleep(0)
    assert knows_nobody(turns)


async def test_a_failure_and_a_cancellation_in_a_turn_end_it() -> None:
    """And nothing else."""
    ranks = Ranks()
    with pytest.raises(RuntimeError):
        async with ranks.turns.take("a", 1):
            raise RuntimeError
    held = await ranks.begin("b", 1)
    while not ranks.busy:
        await asyncio.sleep(0)
    other = await ranks.begin("c", 1)
    held.cancel()
    await other
    assert [name for name, _ in ranks.taken] == ["b", "c"]
    await asyncio.sleep(0)
    assert knows_nobody(ranks.turns)


@pytest.mark.parametrize("seed", range(10))
async def test_nothing_leaks_among_random_cancellations(seed: int) -> None:
    """Whoever was not cancelled had its turn, nobody had one beside another, nothing is left."""
    ranks, rng = Ranks(), random.Random(seed)
    tasks: dict[asyncio.Task[None], str] = {}
    for index in range(300):
        name = f"{rng.randint(0, 20)}"
        tasks[asyncio.create_task(ranks.use_once(name, rng.randint(1, 50)))] = f"{index}"
        if rng.random() < 0.5:
            await asyncio.sleep(0)
        if rng.random() < 0.4:
            rng.choice(list(tasks)).cancel()
    await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
    finished = sum(not task.cancelled() for task in tasks)
    assert 100 < finished < 300
    assert finished <= len(ranks.taken)  # some were cancelled while they held it
    await asyncio.sleep(0)
    assert knows_nobody(ranks.turns)


async def test_idle_models_cost_nothing() -> None:
    """Of 256 models that once had a turn nothing is left, and of 10,000 that came and went while
    another was busy only a few."""
    ranks = Ranks()
    await asyncio.gather(*(ranks.use_once(f"{n}", 100) for n in range(256)))
    await asyncio.sleep(0)
    assert knows_nobody(ranks.turns)
    busy = asyncio.create_task(ranks.use("busy", [1] * 30_000))
    for n in range(10_000):
        await ranks.use_once(f"{n}", 1)
        for _ in range(3):  # what was busy has a turn
            await asyncio.sleep(0)
        assert len(ranks.turns._queue._names[DEFAULT_OWNER]._accounts) <= PURGE_MIN + 2
    assert not busy.done()
    busy.cancel()
    await asyncio.gather(busy, return_exceptions=True)


async def test_many_models_of_one_owner_have_one_share() -> None:
    """Fifty models of one tenant beside two of others: each tenant gets a third."""
    ranks = Ranks()
    heavy = [ranks.use(f"heavy/{n}", [100] * 20) for n in range(50)]
    light = [ranks.use("one/m", [100] * 100), ranks.use("default-m", [100] * 100)]
    await asyncio.gather(*heavy, *light)
    used: Counter[str] = Counter()
    for name, cost in ranks.taken[:240]:
        used[name.partition("/")[0]] += cost
    assert max(used.values()) - min(used.values()) <= 200
    of_heavy = [used for name, used in ranks.tokens(240).items() if name.startswith("heavy")]
    assert len(of_heavy) == 50
    assert max(of_heavy) - min(of_heavy) <= 100
    assert knows_nobody(ranks.turns)


async def test_a_new_owner_waits_for_one_turn_of_each_other() -> None:
    """However many models and turns wait for the others."""
    ranks = Ranks()
    heavy = [asyncio.create_task(ranks.use(f"heavy/{n}", [50] * 4)) for n in range(30)]
    for _ in range(20):
        await asyncio.sleep(0)
    begun = len(ranks.taken)
    await ranks.use_once("new/m", 50)
    names = [name for name, _ in ranks.taken[begun:]]
    assert names.index("new/m") <= 2
    await asyncio.gather(*heavy)


async def test_turns_of_owners_who_leave_are_passed_on() -> None:
    """A cancelled wait of one owner costs nobody a turn, and leaves nothing behind."""
    ranks = Ranks()
    async with ranks.turns.take("a/m", 5):
        gone = [await ranks.begin(f"b/{n}", 5) for n in range(5)]
        last = await ranks.begin("c/m", 5)
        for task in gone:
            task.cancel()
        await asyncio.sleep(0)
    await asyncio.gather(last, *gone, return_exceptions=True)
    assert [name for name, _ in ranks.taken] == ["c/m"]
    assert knows_nobody(ranks.turns)
