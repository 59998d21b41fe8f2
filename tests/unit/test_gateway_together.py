"""Looks at all that a caller of the gateway has are made one at a time for each caller."""

import asyncio

import pytest

from tinsmithd.gateway.tinker.runs import together
from tinsmithd.gateway.tinker.runs.together import Together


class Looking:
    """Counts looks, each of which sees what is there when it begins, and ends when it is let."""

    def __init__(self) -> None:
        self.there = 0
        self.begun = self.under_way = self.most = 0
        self.may_end = asyncio.Event()

    async def __call__(self) -> int:
        self.begun += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        seen = self.there
        await self.may_end.wait()
        self.under_way -= 1
        return seen


async def asked(together: Together, question: str, look: Looking, count: int) -> list[asyncio.Task]:
    """Ask so many times at once."""
    tasks = [asyncio.create_task(together.look(question, look)) for _ in range(count)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks


async def test_who_asks_meanwhile_has_the_next_look() -> None:
    """It begins after they asked, and sees what they did; a thousand of them are one."""
    looks, look = Together(), Looking()
    first = await asked(looks, "all", look, 1)
    look.there = 1
    others = await asked(looks, "all", look, 1000)
    assert look.begun == 1
    look.may_end.set()
    assert [await task for task in first] == [0]
    assert {await task for task in others} == {1}
    assert (look.begun, look.most) == (2, 1)
    assert not looks._looks


async def test_other_questions_and_other_callers_wait_for_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks, look = Together(), Looking()
    tasks = await asked(looks, "one", look, 1) + await asked(looks, "two", look, 1)
    monkeypatch.setattr(together, "part", lambda: "somebody else")
    tasks += await asked(looks, "one", look, 1)
    assert look.under_way == 3
    look.may_end.set()
    assert [await task for task in tasks] == [0, 0, 0]


async def test_who_goes_away_or_fails_holds_nobody_up() -> None:
    looks, look = Together(), Looking()
    (gone,) = await asked(looks, "all", look, 1)
    gone.cancel()
    waiting = await asked(looks, "all", look, 1)
    look.may_end.set()
    assert await waiting[0] == 0

    async def failing() -> int:
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            await looks.look("all", failing)
    assert not looks._looks
