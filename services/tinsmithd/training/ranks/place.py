"""The rank group at work: where it is found, waited for, attached and detached."""

import asyncio
import logging
from collections.abc import Callable

from tinsmithd.errors import Reason, Unavailable
from tinsmithd.training.ranks.counts import Counts
from tinsmithd.training.ranks.interface import RankGroup

_log = logging.getLogger(__name__)


class RankGroupPlace:
    """Holds the one rank group that is at work, or none.

    Attributes:
        current: The group, or None.
        progress: What a group that is not ready yet is doing, for a person.
        counts: What all groups of this process did so far.
        on_attached, on_detached: Called after a group began or ended its work here.
    """

    def __init__(self) -> None:
        self.current: RankGroup | None = None
        self.progress = "none has attached yet"
        self.counts = Counts()
        self.on_attached: Callable[[], None] = lambda: None
        self.on_detached: Callable[[], None] = lambda: None
        self._changed = asyncio.Event()

    def attach(self, group: RankGroup) -> None:
        """Use this group from now on."""
        self.counts.rank_groups += 1
        self._set(group)
        self.on_attached()

    def detach(self, group: RankGroup) -> None:
        """A group is gone, with the models as it held them; no effect for any but the current."""
        if self.current is not group:
            return
        self._set(None)
        self.progress = "it went away and has to start again"
        self.on_detached()

    def _set(self, group: RankGroup | None) -> None:
        self.current = group
        self._changed.set()
        self._changed = asyncio.Event()

    def need(self) -> RankGroup:
        """The group.

        Raises:
            Unavailable: There is none (RANK_GROUP_UNAVAILABLE).
        """
        if self.current is None:
            raise Unavailable(
                f"the ranks are not ready: {self.progress}",
                Reason.RANK_GROUP_UNAVAILABLE,
                retry_after_s=1.0,
            )
        return self.current

    async def wait(self) -> RankGroup:
        """The group, once there is one."""
        while self.current is None:
            await self._changed.wait()
        return self.current
