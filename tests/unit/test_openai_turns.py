"""Callers of OpenAI's API take turns to have what they sent read."""

import asyncio

import pytest

from tinsmithd.gateway.openai import turns
from tinsmithd.gateway.openai.turns import Turns


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who calls."""
    found = ["alice"]
    monkeypatch.setattr(turns, "peer", lambda: found[0])
    return found


async def queue(
    found: Turns, name: str, count: int, cost: int, log: list[str]
) -> list[asyncio.Task]:
    """Have so many turns waited for; each says so, and lets everybody else go on."""

    async def one() -> None:
        async with found.turn(cost):
            log.append(name)
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(one()) for _ in range(count)]
    await asyncio.sleep(0)
    return tasks


async def test_who_sends_much_waits_for_its_own(now: list[str]) -> None:
    """However long a queue is, another caller's turn comes with the next ones; of large turns
    others get as many small ones as they are worth."""
    found, log = Turns(2), list[str]()
    tasks = await queue(found, "alice", 1000, 100, log)
    now[0] = "bob"
    tasks += await queue(found, "bob", 5, 10, log)
    await asyncio.gather(*tasks)
    assert log.index("bob") <= 4
    assert max(place for place, name in enumerate(log) if name == "bob") <= 12


async def test_one_caller_has_all_turns_and_gives_them_back(now: list[str]) -> None:
    """Also where it goes away while it waits, or has just been given one."""
    found = Turns(2)
    taken = [found.turn(1) for _ in range(5)]  # kept, or a collector would give them back
    for turn in taken[:2]:
        await turn.__aenter__()
    waiting = [asyncio.create_task(turn.__aenter__()) for turn in taken[2:]]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    waiting[0].cancel()
    found._end()
    waiting[1].cancel()  # which has been given the turn, and does not know it yet
    await asyncio.gather(*waiting, return_exceptions=True)
    assert [task.cancelled() for task in waiting] == [True, True, False]
    found._end()
    found._end()
    assert found._free == 2
