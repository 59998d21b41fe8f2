"""What a call leaves behind."""

import asyncio
import gc
import weakref
from typing import Any

from tinsmithd.rpc.budget import Budget
from tinsmithd.rpc.flow import Flow


async def test_a_call_that_has_ended_is_free_without_the_collector() -> None:
    """Thousands of them, each in a cycle, would have all calls wait for it."""

    async def abort(_: Exception) -> None: ...

    async def served() -> "weakref.ref[Flow]":
        budget, context = Budget("calls", 1, 1.0), object()
        taken: dict[str, Any] = {"place": budget.lease("peer"), "received": None, "stall_s": None}
        with Flow(context, abort, "peer", None, **taken) as flow:
            flow.take_place()
            return weakref.ref(flow)

    gc.disable()
    try:
        left = await asyncio.create_task(served())
        await asyncio.sleep(0)
        assert left() is None
    finally:
        gc.enable()
