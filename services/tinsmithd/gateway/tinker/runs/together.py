"""Looks at all that a caller has: one at a time for each caller and question.

A tenant may have a hundred thousand checkpoints, and ask for a list of them a thousand times at
once. Who asks while a look is under way has the next one, with all the others who do: it begins
after they asked, so they see what they have done.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

from tinsmithd.gateway.callers import part

T = TypeVar("T")


@dataclass
class _Looks:
    """The look that is under way, and the one after it."""

    now: "asyncio.Task[Any] | None" = None
    following: "asyncio.Task[Any] | None" = None


class Together:
    """Lives on one event loop."""

    def __init__(self) -> None:
        self._looks: dict[tuple[str, Hashable], _Looks] = {}

    async def look(self, question: Hashable, ask: Callable[[], Awaitable[T]]) -> T:
        """What `ask` finds, which begins to look from now on.

        Args:
            question: Tells what is asked for from all else that the caller may ask.
            ask: Looks; every caller of one question has the same.
        """
        key = part(), question
        looks = self._looks.setdefault(key, _Looks())
        if looks.following is None:
            looks.following = asyncio.create_task(self._after(key, looks, ask))
            # Whoever asked may be gone, and then nobody has to hear of a failure.
            looks.following.add_done_callback(lambda done: done.cancelled() or done.exception())
        found: T = await asyncio.shield(looks.following)
        return found

    async def _after(
        self, key: tuple[str, Hashable], looks: _Looks, ask: Callable[[], Awaitable[T]]
    ) -> T:
        if looks.now is not None:
            await asyncio.wait([looks.now])
        looks.now, looks.following = looks.following, None
        try:
            return await ask()
        finally:
            looks.now = None
            if looks.following is None:
                del self._looks[key]
