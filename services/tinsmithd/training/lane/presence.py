"""Whether the ranks have a model's state, and its ways to them and from them."""

import asyncio
import logging
from collections.abc import Callable

from tinsmithd.errors import DataLoss, TinsmithError, Unavailable
from tinsmithd.owners import logged_id
from tinsmithd.training.lane.context import LaneContext
from tinsmithd.training.lane.interface import TakeTurn
from tinsmithd.training.ranks import ModelBroken, RankGroupLost

BROKEN_PAUSE_S = 1.0
"""Between two tries to bring a model back that the ranks could not hold."""

_log = logging.getLogger(__name__)


class Presence:
    """Of one model.

    Args:
        context: What the lane's parts share.
        is_open: Whether its lane is; nobody needs to hear why a closed one fails.

    Attributes:
        leaving: It is to leave the ranks before its next call.
        suspended: It left them, and its next call brings it back.
        resuming: It is being brought back because of a call, not because the ranks were lost.
        blocked: Why the ranks that there are cannot take it; None where they can.
        went_with_ranks: It is absent because its ranks are gone, so that they hold nothing of it.
    """

    def __init__(self, context: LaneContext, is_open: Callable[[], bool]) -> None:
        self._context = context
        self._model_id, self._name = context.model_id, logged_id(context.model_id)
        self._is_open = is_open
        self.leaving = self.suspended = self.resuming = self.went_with_ranks = False
        self.blocked: TinsmithError | None = None
        self._losses = self._restored_losses = 0

    @property
    def absent(self) -> bool:
        """True while the ranks do not have it."""
        return self._losses != self._restored_losses

    def lose(self, *, went_with_ranks: bool = False) -> None:
        """The ranks do not have it any more, or not as it should be."""
        self._losses += 1
        self.resuming, self.went_with_ranks = False, went_with_ranks

    def suspend(self) -> None:
        """It left the ranks."""
        self.lose()
        self.leaving, self.suspended = False, True
        if self._is_open():
            self._context.census.suspended.add(self._model_id)

    def stay_on_disk(self) -> None:
        """Nobody waits for it: others come first. Its next call finds out what ranks there are."""
        self.blocked = None
        self.suspend()
        self._context.executor.left()

    async def leave(self, turn: TakeTurn) -> None:
        """Take it off the ranks."""
        try:
            if not self.absent:
                await self._context.executor.suspend(turn)
        except (TinsmithError, RankGroupLost, ModelBroken) as error:
            # Whatever the ranks still hold of it, they drop it before they get it again.
            if self._is_open():
                _log.warning("model %s left the ranks with an error: %s", self._name, error)
        self.stay_on_disk()

    async def come_back(self, turn: TakeTurn) -> None:
        """Try to bring it back to the ranks; it is `absent` until that succeeds.

        Raises:
            DataLoss: Nobody has its state any more.
        """
        self.resuming = self.resuming or self.suspended
        self.suspended = False
        self._context.census.suspended.discard(self._model_id)
        losses = self._losses
        try:
            await self._context.executor.restore(turn)
        except DataLoss:
            raise
        except RankGroupLost as error:
            _log.warning("model %s has to be brought back again: %s", self._name, error)
        except ModelBroken as error:
            _log.error("model %s could not be brought back yet: %s", self._name, error)
            await asyncio.sleep(BROKEN_PAUSE_S)
        except TinsmithError as error:
            if self._is_open():
                _log.error("model %s could not be brought back yet: %s", self._name, error)
                self.blocked = error if isinstance(error, Unavailable) else None
                await asyncio.sleep(BROKEN_PAUSE_S)
        else:
            self._restored_losses = losses  # unless it was lost again meanwhile
            self.resuming = self.resuming and self.absent
            self.blocked = None
