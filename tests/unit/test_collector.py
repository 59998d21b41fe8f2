"""When Python's collector looks for cycles."""

import asyncio
import gc
import weakref

import pytest

from tinsmithd.processes import collect_between_calls, collector


class Knot:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.itself = self


def tied() -> "weakref.ref[Knot]":
    return weakref.ref(Knot())


async def test_cycles_are_found_while_nothing_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before; and the process is as it was when nobody collects so any more."""
    monkeypatch.setattr(collector, "INTERVAL_S", 0.001)
    before, looked = gc.get_threshold(), 0
    idle = False

    def is_idle() -> bool:
        nonlocal looked
        looked += 1
        return idle

    collecting = asyncio.create_task(collect_between_calls(is_idle))
    await asyncio.sleep(0)
    try:
        knot = tied()
        many = [[] for _ in range(10 * before[0])]  # type: ignore[var-annotated]
        while looked < 3:
            await asyncio.sleep(0.001)
        assert knot() is not None
        idle = True
        async with asyncio.timeout(30):
            while knot() is not None:
                await asyncio.sleep(0.001)
        del many
    finally:
        collecting.cancel()
        await asyncio.wait([collecting])
        gc.unfreeze()
    assert gc.get_threshold() == before


async def test_much_garbage_is_found_whatever_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "YOUNG_MAX", 1000)
    collecting = asyncio.create_task(collect_between_calls(lambda: False))
    await asyncio.sleep(0)
    try:
        knots = [tied() for _ in range(2000)]
        assert not all(knot() is not None for knot in knots)
    finally:
        collecting.cancel()
        await asyncio.wait([collecting])
        gc.unfreeze()
