"""What every call passes through."""

import asyncio

from tinsmithd.errors import Reason, Unavailable
from tinsmithd.rpc.interceptors import forget_frames


async def test_an_error_that_is_answered_ends_nobody_who_still_holds_it() -> None:
    """A lane that cannot go on keeps one error for all its callers, and tries again."""
    held: list[Unavailable] = []

    async def lane() -> str:
        try:
            raise Unavailable("not now", Reason.SHUTTING_DOWN, retry_after_s=1.0)
        except Unavailable as error:
            held.append(error)
            await asyncio.sleep(0)
        return "went on"

    running = asyncio.create_task(lane())
    while not held:
        await asyncio.sleep(0)
    forget_frames(held[0])

    assert held[0].__traceback__ is None
    assert await asyncio.wait_for(running, 10) == "went on"
