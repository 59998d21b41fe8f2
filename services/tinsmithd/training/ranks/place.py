"""Where the rank group at work is to be found, and waited for."""

import asyncio

from tinsmithd.errors import Reason, Unavailable
from tinsmithd.training.call.counts import Counts
from tinsmithd.training.ranks.interface import Trainer


class TrainerPlace:
    """The one rank group that is at work, or none.

    Attributes:
        current: The group, or None.
        progress: What a trainer that is not ready is doing, for a person.
        counts: What all groups did so far.
    """

    def __init__(self) -> None:
        self.current: Trainer | None = None
        self.progress = "none has attached yet"
        self.counts = Counts()
        self._changed = asyncio.Event()

    def set(self, trainer: Trainer | None) -> None:
        """Another group is at work, or none."""
        self.current = trainer
        self.counts.rank_groups += trainer is not None
        self._changed.set()
        self._changed = asyncio.Event()

    def need(self) -> Trainer:
        """The group.

        Raises:
            Unavailable: There is none (TRAINER_UNAVAILABLE).
        """
        if self.current is None:
            raise Unavailable(
                f"the trainer is not ready: {self.progress}",
                Reason.TRAINER_UNAVAILABLE,
                retry_after_s=1.0,
            )
        return self.current

    async def wait(self) -> Trainer:
        """The group, once there is one."""
        while self.current is None:
            await self._changed.wait()
        return self.current
