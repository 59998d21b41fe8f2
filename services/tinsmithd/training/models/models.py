"""The models of the cluster, as servicer and server see them."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from tinsmithd.domain import new_model_id
from tinsmithd.errors import InvalidArgument, Reason, Unavailable
from tinsmithd.keys import Caller
from tinsmithd.owners import owner_of
from tinsmithd.training.call import Answer, Call, model_lost, shutting_down
from tinsmithd.training.journal import (
    DeletedModel,
    Fenced,
    Journal,
    StoreDamaged,
    StoredModel,
    StoredStep,
)
from tinsmithd.training.lane import Census, Turns
from tinsmithd.training.models.checkpoints import Checkpoints
from tinsmithd.training.models.creation import Creation
from tinsmithd.training.models.deletion import Deletion
from tinsmithd.training.models.model import Model, NewModel
from tinsmithd.training.models.quotas import Quotas
from tinsmithd.training.models.recall import Recall
from tinsmithd.training.models.registry import Registry
from tinsmithd.training.models.seats import Seats
from tinsmithd.training.models.shared import ModelLimits, Shared
from tinsmithd.training.models.snapshot_store import SnapshotStore
from tinsmithd.training.models.starts import Starts
from tinsmithd.training.ranks import RankGroupPlace

DRAIN_POLL_S = 0.05

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelCounts:
    """Numbers of models, and of their calls that were taken in and are not answered."""

    models: int
    lost: int
    recovering: int
    suspended: int
    pending_calls: int


@dataclass(frozen=True)
class OwnerCounts:
    """Numbers of the models of one owner, and of their calls that are not answered."""

    models: int
    pending_calls: int


class Models:
    """All models of one rank group.

    Lives on one event loop. Everything that touches the ranks takes a turn.

    Args:
        limits: Bounds.
        checkpoints: Those of the Checkpoint server.
        journal: Where everything is written down; open.
        snapshot_store: Where states are kept; None where the journal keeps nothing.
        new_id: Makes the id of a model, which nobody can guess.

    Attributes:
        place: Where the rank group is.
        quotas: What each tenant may have.
    """

    def __init__(
        self,
        limits: ModelLimits,
        checkpoints: Checkpoints,
        journal: Journal,
        snapshot_store: SnapshotStore | None,
        new_id: Callable[[], str] = new_model_id,
    ) -> None:
        self._journal = journal
        self.place = RankGroupPlace()
        self.place.on_attached = self._attached
        self.place.on_detached = self._detached
        self._census = Census()
        self._registry = Registry(
            limits.models_kept_max, self._census, forget_lost=not journal.keeps
        )
        self._seats = Seats(
            limits.seats,
            suspends=journal.keeps,
            free=lambda model: self._deletion.evict(model),
        )
        starts = Starts(journal, limits.lane.call_attempts_max)
        self.quotas = Quotas(limits.quotas)
        shared = Shared(
            *(limits, checkpoints, journal, snapshot_store, self.place, Turns()),
            *(self._seats, starts, self.quotas, self._census),
        )
        self._creation = Creation(shared, self._registry, new_id, self._lose_ranks)
        self._deletion = Deletion(shared, self._registry)
        self._recall = Recall(shared, self._registry, self._creation)

    # --- as a whole ---------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """True while calls can be taken in and carried out."""
        return self.place.current is not None and self._journal.writable

    @property
    def idle(self) -> bool:
        """True while no call waits and none is carried out."""
        return not any(lane.pending for lane in self._census.stirred)

    @property
    def recovering(self) -> int:
        """Number of models that the ranks do not have and should, though nobody suspended them."""
        return sum(lane.recovering and not lane.resuming for lane in self._census.stirred)

    @property
    def counts(self) -> ModelCounts:
        """How many there are, as they are now."""
        stirred = self._census.stirred
        return ModelCounts(
            models=len(self._registry),
            lost=len(self._census.lost),
            recovering=sum(lane.recovering for lane in stirred),
            suspended=len(self._census.suspended),
            pending_calls=sum(lane.pending for lane in stirred),
        )

    def by_owner(self) -> Mapping[str, OwnerCounts]:
        """How many each owner has; another thread may ask."""
        pending: dict[str, int] = {}
        for model_id, lane in self._census.active():
            owner = owner_of(model_id)
            pending[owner] = pending.get(owner, 0) + lane.pending
        counts = self._registry.counts_by_owner()
        return {owner: OwnerCounts(n, pending.get(owner, 0)) for owner, n in counts.items()}

    def _attached(self) -> None:
        if self.recovering:
            _log.info("%d model(s) have to be brought back", self.recovering)

    def _detached(self) -> None:
        for model in self._registry.oldest_first:
            self._lose_ranks(model)

    def _lose_ranks(self, model: Model) -> None:
        """The ranks do not have a model any more: bring it back, where that can be done."""
        if self._journal.keeps:
            model.lane.lose_ranks()
        else:
            model.lane.close(model_lost(model.model_id))

    async def recall(
        self,
        stored: Sequence[StoredModel],
        deleted: Sequence[DeletedModel] = (),
        starts: Mapping[str, int] = MappingProxyType({}),
        used_ids: Sequence[str] = (),
    ) -> None:
        """Take up what the journal has, see `Recall.recall`."""
        await self._recall.recall(stored, deleted, starts, used_ids)

    async def stop(self, grace_s: float) -> None:
        """Tell all who wait that the server stops; returns when nothing is under way any more.

        Args:
            grace_s: How long calls under way may take; then their callers are told, too.
        """
        self._seats.give_up_creations(shutting_down())
        lanes = [model.lane for model in self._registry.oldest_first]
        for lane in lanes:
            lane.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while any(lane.under_way for lane in lanes):
                    await asyncio.sleep(DRAIN_POLL_S)
        for lane in lanes:
            lane.stop(under_way=True)

    # --- models -------------------------------------------------------------------------------

    def on_deleted(self, tell: Callable[[str], None]) -> None:
        """Tell somebody the id of each model that is gone, from now on."""
        self._registry.on_deleted = tell

    async def create(self, request: NewModel) -> Model:
        """Create a model, or return the one that this `request_id` created before."""
        return await self._creation.create(request)

    def get(self, model_id: str) -> Model:
        """One model, by the id that it has inside.

        Raises:
            NotFound: There is none of this id (MODEL_NOT_FOUND).
        """
        return self._registry.get(model_id)

    def find(self, caller: Caller, model_id: str) -> Model:
        """The model that a caller means, see `Registry.find`."""
        return self._registry.find(caller, model_id)

    def exists(self, model_id: str) -> bool:
        """Whether there is a model of this id, which is one inside."""
        return model_id in self._registry

    def list(self) -> Sequence[Model]:
        """All models, newest first."""
        return self._registry.oldest_first[::-1]

    def page(self, caller: Caller, below: int | None, size: int) -> tuple[Sequence[Model], int]:
        """A page of the models that are there for a caller, see `Registry.page`."""
        return self._registry.page(caller, below, size)

    async def steps(
        self, model: Model, below: int | None, size: int
    ) -> tuple[Sequence[StoredStep], int]:
        """A page of a model's optimizer steps, newest first, and how many are remembered in all.

        Args:
            model: Which model.
            below: Only those at positions below this one; None for all.
            size: Number of steps, at most.

        Raises:
            Unavailable: They cannot be read (STORAGE_UNAVAILABLE), or this process ends.
        """
        try:
            return await self._journal.steps(model.model_id, below, size)
        except Fenced as error:
            raise shutting_down() from error
        except StoreDamaged as error:
            reason = Reason.STORAGE_UNAVAILABLE
            raise Unavailable("the steps cannot be read", reason, retry_after_s=1.0) from error

    async def delete(self, model_id: str) -> None:
        """Delete a model, by the id that it has inside; calls that still wait for it fail as not
        found."""
        await self._deletion.delete(model_id)

    async def delete_idle(self) -> None:
        """Delete the models that no call used for `model_idle_ttl_s`."""
        await self._deletion.delete_idle()

    # --- calls on one model -------------------------------------------------------------------

    async def wake(self, model: Model) -> None:
        """Have the calls of a model read that a start left on disk; comes before the next two."""
        if model.asleep:
            await self._recall.wake(model)

    def submit(self, model: Model, call: Call) -> Answer:
        """Queue a call, see `Lane.submit`; `ModelExecutor` says what its answer holds.

        Raises:
            InvalidArgument: The number is below 0.
        """
        if call.seq_id < 0:
            raise InvalidArgument("seq_id", f"{call.seq_id} is below 0")
        assert not model.asleep
        self._registry.called(model)
        return model.lane.submit(self.quotas.readable(model, call))

    def answer(self, model: Model, seq_id: int, digest: bytes | None) -> Answer:
        """The answer of a numbered call that was sent before, see `Lane.answer`."""
        assert not model.asleep
        self._registry.called(model)
        return model.lane.answer(seq_id, digest)
