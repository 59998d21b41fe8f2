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
    """Not before, where they are not new; and the process is as it was when nobody collects so."""
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
        tie = Knot()
        many = [[] for _ in range(10 * collector.YOUNG_MAX)]  # type: ignore[var-annotated]
        knot = weakref.ref(tie)
        del tie
        many += [[] for _ in range(10 * collector.YOUNG_MAX)]
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


async def test_a_look_beside_calls_is_at_few_objects() -> None:
    """However many there are: all threads wait for it."""
    looks: list[int] = []

    def look(phase: str, about: dict[str, int]) -> None:
        if phase == "start":
            looks.append(about["generation"])

    collecting = asyncio.create_task(collect_between_calls(lambda: False))
    await asyncio.sleep(0)
    gc.callbacks.append(look)
    try:
        knot = tied()
        many = [[] for _ in range(collector.OLDER_MAX // 4)]  # type: ignore[var-annotated]
        assert knot() is None
        assert len(looks) >= len(many) // collector.YOUNG_MAX - 1
        assert set(looks) == {0}
    finally:
        gc.callbacks.remove(look)
        collecting.cancel()
        await asyncio.wait([collecting])
        gc.unfreeze()


async def test_much_garbage_is_found_whatever_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where it is not new any more."""
    monkeypatch.setattr(collector, "OLDER_MAX", 10 * collector.YOUNG_MAX)
    collecting = asyncio.create_task(collect_between_calls(lambda: False))
    await asyncio.sleep(0)
    try:
        tie = Knot()
        many = [[] for _ in range(2 * collector.YOUNG_MAX)]  # type: ignore[var-annotated]
        knot = weakref.ref(tie)
        del tie
        many += [[] for _ in range(20 * collector.YOUNG_MAX)]
        assert knot() is None
        del many
    finally:
        collecting.cancel()
        await asyncio.wait([collecting])
        gc.unfreeze()
