"""Waiting until something is so."""

import asyncio
from collections.abc import Callable


async def until(true: Callable[[], object], seconds: float = 30) -> None:
    """Let everything else run until a condition holds.

    Raises:
        TimeoutError: In vain.
    """
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.005)
