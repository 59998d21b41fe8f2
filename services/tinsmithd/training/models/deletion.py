"""How a model goes: out of the journal, off the ranks, and off the disk."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from typing import Any

from tinsmithd.training.call import NOMINAL_TOKENS, model_not_found, shutting_down
from tinsmithd.training.journal import DeleteModel, Fenced
from tinsmithd.training.models.model import Model
from tinsmithd.training.models.registry import Registry
from tinsmithd.training.models.shared import Shared, coming_and_going
from tinsmithd.training.ranks import RankGroupLost

_log = logging.getLogger(__name__)


class Deletion:
    """Deletes models.

    Args:
        shared: What they share.
        registry: Where they are.
    """

    def __init__(self, shared: Shared, registry: Registry) -> None:
        self._shared = shared
        self._registry = registry
        self._tasks: set[asyncio.Task[None]] = set()

    async def delete(self, model_id: str) -> None:
        """Delete a model; calls that still wait for it fail as not found.

        Raises:
            NotFound: There is none of this id (MODEL_NOT_FOUND).
        """
        model = self._registry.get(model_id)
        journal, seats = self._shared.journal, self._shared.seats
        try:
            remember = bool(model.request_id)
            await journal.commit(DeleteModel(model_id, remember, keep_id=model.chose_id))
        except Fenced as error:
            raise shutting_down() from error
        if not self._registry.remove(model_id):
            return  # somebody else deleted it in the same moment
        was_lost = model.lane.lost
        gone = model_not_found(model.public_id)
        model.lane.close(gone)
        model.lane.forget()
        seats.give_up(model, gone)
        self._registry.on_deleted(model_id)
        dropped = self.evict(model)
        self._later(self._sweep(model, dropped))
        if not was_lost or journal.keeps:
            await asyncio.shield(dropped)

    async def delete_idle(self) -> None:
        """Delete the models that no call used for `model_idle_ttl_s`."""
        oldest_s = time.monotonic() - self._shared.limits.model_idle_ttl_s
        for model in self._registry.unused_since(oldest_s):
            if (
                model.last_used_s < oldest_s
                and model.lane.idle
                and model.model_id in self._registry
            ):
                _log.info("model %s was idle too long and is deleted", model.log_name)
                await self.delete(model.model_id)

    def evict(self, model: Model) -> "asyncio.Task[None]":
        """Make the ranks drop a model that is deleted or lost, and let another have its seat."""
        return self._later(self._drop(model))

    def _later(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _drop(self, model: Model) -> None:
        group, seats = self._shared.place.current, self._shared.seats
        if group is not None and model in seats:
            async with self._shared.turns.take(coming_and_going(model.owner), NOMINAL_TOKENS):
                with contextlib.suppress(RankGroupLost):  # then the model went with its ranks
                    await group.delete_model(model.model_id)
        seats.leave(model)

    async def _sweep(self, model: Model, dropped: "asyncio.Task[None]") -> None:
        await asyncio.wait([dropped])
        # The call under way, or a snapshot, may still add some.
        await model.lane.ended()
        self._shared.seats.leave(model)  # one that it got in its last moment
        await model.lane.executor.forget()
