"""How long the Checkpoint server is waited for."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from tinsmithd.errors import Reason, Unavailable


@dataclass(frozen=True)
class Patience:
    """How long the Checkpoint server is waited for, seconds.

    Attributes:
        answer_s_max: For the answer to a call that moves no data, and for the server to come back
            when the connection of a read broke.
        stall_s_max: For the next progress of a stream.
    """

    answer_s_max: float = 30.0
    stall_s_max: float = 60.0


ORDINARY = Patience()
"""That of the settings' defaults."""


@contextlib.asynccontextmanager
async def progress_within(stall_s: float) -> AsyncIterator[None]:
    """Bound the body of the `async with`, in which a stream makes progress.

    Raises:
        Unavailable: It made none (CHECKPOINT_UNAVAILABLE).
    """
    try:
        async with asyncio.timeout(stall_s):
            yield
    except TimeoutError as error:
        text = f"the Checkpoint server made no progress for {stall_s:g} s"
        raise Unavailable(text, Reason.CHECKPOINT_UNAVAILABLE, retry_after_s=1.0) from error
