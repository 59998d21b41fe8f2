"""The order of numbered calls in a gateway: who may be sent, and what thousands that wait cost."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tinsmith.connection import WINDOW
from tinsmithd.gateway.tinker.order import Order
from waiting import until

CALLS = 3000


class Cluster:
    """Makes an attempt, once."""

    async def retrying(
        self, _: str, attempt: Callable[[], Awaitable[Any]], *, model_id: str
    ) -> Any:
        assert model_id == "m"
        return await attempt()


class Calls:
    """Calls of one model, which end when their numbers are let go."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.gates: dict[int, asyncio.Event] = {}
        self._order = Order(Cluster())  # type: ignore[arg-type]

    def make(self, seq_id: int) -> "asyncio.Task[int]":
        gate = self.gates[seq_id] = asyncio.Event()

        async def attempt() -> int:
            self.sent.append(seq_id)
            await gate.wait()
            return seq_id

        return asyncio.create_task(self._order.call("step", "m", seq_id, attempt))


async def test_calls_are_sent_that_are_in_the_window() -> None:
    """Those beyond it follow as the first one ends, whatever order they came in."""
    calls = Calls()
    tasks = [calls.make(seq_id) for seq_id in [1, *range(3 * WINDOW, 1, -1)]]
    await asyncio.sleep(0)
    assert sorted(calls.sent) == list(range(1, WINDOW + 1))
    calls.gates[2].set()
    await asyncio.sleep(0.01)
    assert max(calls.sent) == WINDOW
    calls.gates[1].set()
    await until(lambda: len(calls.sent) == WINDOW + 2)
    assert max(calls.sent) == WINDOW + 2
    for gate in calls.gates.values():
        gate.set()
    assert sorted(await asyncio.gather(*tasks)) == list(range(1, 3 * WINDOW + 1))


@pytest.mark.timeout(60)
async def test_thousands_that_wait_cost_little_when_one_ends() -> None:
    """Each end looks at a window, and not at all that wait: three loops over them took minutes."""
    calls = Calls()
    tasks = [calls.make(seq_id) for seq_id in range(1, CALLS + 1)]
    await asyncio.sleep(0)
    for gate in calls.gates.values():
        gate.set()
    assert await asyncio.gather(*tasks) == list(range(1, CALLS + 1))
