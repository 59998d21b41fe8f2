"""How long a lane has had no call."""

import asyncio
from collections.abc import Callable


class Rest:
    """Says once, some time after the last call, that a lane is at rest.

    Args:
        after_s: So long after.
        on_due: Called then.

    Attributes:
        since_s: When the last call ended, by the loop's clock.
        due: Whether the time has come, until there is a call again or somebody resets it.
    """

    def __init__(self, after_s: float, on_due: Callable[[], None]) -> None:
        self._after_s = after_s
        self._on_due = on_due
        self._timer: asyncio.TimerHandle | None = None
        self.since_s = 0.0
        self.due = False

    def call_begins(self) -> None:
        """There is no rest now."""
        self.due = False
        if self._timer is not None:
            self._timer.cancel()

    def call_ended(self) -> None:
        """It begins, unless another call follows."""
        loop = asyncio.get_running_loop()
        self.since_s = loop.time()
        self._timer = loop.call_later(self._after_s, self._become_due)

    def _become_due(self) -> None:
        self.due = True
        self._on_due()
