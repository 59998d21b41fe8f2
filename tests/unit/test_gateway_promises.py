"""Promises of the gateway: what is under way is bounded."""

import asyncio

import pytest

from tinsmithd.config import GatewaySettings
from tinsmithd.gateway.problems import Problem
from tinsmithd.gateway.tinker.promises import Promises


async def test_results_under_way_are_bounded_by_what_their_names_carry() -> None:
    """And their room is there again once they have ended."""
    promises = Promises(GatewaySettings(received_bytes_max=1000), asyncio.Event())
    until = asyncio.Event()

    async def result() -> dict[str, str]:
        await until.wait()
        return {}

    promises.start("a" * 600, result())
    with pytest.raises(Problem) as refused:
        promises.start("b" * 600, result())
    assert refused.value.status == 503
    until.set()
    assert await promises.wait("a" * 600, 5) is not None
    promises.start("b" * 600, result())
    assert await promises.wait("b" * 600, 5) is not None
