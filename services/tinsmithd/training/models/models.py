"""The models of the cluster: how they come, go, and come back. What can be done with one is in
`calls`, in which order in `scheduler`."""

import asyncio
import contextlib
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from tinsmithd.checkpoint_client import CheckpointInfo
from tinsmithd.domain import CheckpointKind, Tuning
from tinsmithd.errors import (
    DataLoss,
    InvalidArgument,
    NotFound,
    Reason,
    Unavailable,
)
from tinsmithd.training.call.answer import Answer
from tinsmithd.training.call.batches import NOMINAL_TOKENS
from tinsmithd.training.call.work import Work
from tinsmithd.training.journal.journal import Journal
from tinsmithd.training.journal.records import (
    AddModel,
    AddSnapshot,
    DeletedModel,
    DeleteModel,
    Fenced,
    StoredModel,
    Write,
)
from tinsmithd.training.lane.interface import (
    Call,
    LaneLimits,
    model_lost,
    model_not_found,
    shutting_down,
)
from tinsmithd.training.lane.lane import Lane
from tinsmithd.training.lane.turns import Turns
from tinsmithd.training.models.checkpoints import (
    Checkpoints,
    check_base_model,
    check_claim,
    wrong_kind,
)
from tinsmithd.training.models.creations import Creations
from tinsmithd.training.models.execution import CallLimits, ModelRules
from tinsmithd.training.models.model import Model, NewModel
from tinsmithd.training.models.recall import recall_calls
from tinsmithd.training.models.seats import SeatLimits, Seats, too_many_models
from tinsmithd.training.models.snapshots import Snapshots
from tinsmithd.training.models.staging import Staged, whole
from tinsmithd.training.models.starts import Starts, key_of_checkpoint, key_of_request
from tinsmithd.training.ranks.interface import ModelBroken, StateInfo, Trainer, TrainerLost
from tinsmithd.training.ranks.place import TrainerPlace

DRAIN_POLL_S = 0.05
_COMING_AND_GOING = ""
"""Whose turns create and delete models: all of these together count as one model."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelLimits:
    """Bounds on models and calls; the names are those of the settings."""

    models_kept_max: int
    model_idle_ttl_s: float
    seats: SeatLimits
    lane: LaneLimits
    calls: CallLimits


class Models:
    """All models of one rank group.

    Lives on one event loop. Everything that touches the trainer takes a turn.

    Args:
        limits: Bounds.
        checkpoints: Those of the Checkpoint server.
        journal: Where everything is written down; open.
        snapshots: Where states are kept; None where the journal keeps nothing.
        new_id: Makes the id of a model, which nobody can guess.

    Attributes:
        place: Where the rank group is to be found.
        on_deleted: Told of each model that was deleted.
    """

    def __init__(
        self,
        limits: ModelLimits,
        checkpoints: Checkpoints,
        journal: Journal,
        snapshots: Snapshots | None,
        new_id: Callable[[], str] = lambda: secrets.token_hex(16),
    ) -> None:
        self._limits = limits
        self._checkpoints = checkpoints
        self._journal = journal
        self._snapshots = snapshots
        self._new_id = new_id
        self._models: OrderedDict[str, Model] = OrderedDict()
        self._deletions: set[asyncio.Task[None]] = set()
        self._creations = Creations()
        self._starts = Starts(journal, limits.lane.call_attempts_max)
        self.place = TrainerPlace()
        self._turns = Turns()
        self._seats = Seats(limits.seats, suspends=journal.keeps, free=self._evict)
        self._created_count = 0
        self.on_deleted: Callable[[str], None] = lambda model_id: None

    # --- the trainer comes and goes -----------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Of this process, among all that had its journal."""
        return self._journal.epoch

    @property
    def ready(self) -> bool:
        """True while calls can be taken in and carried out."""
        return self.place.current is not None and self._journal.writable

    @property
    def recovering(self) -> Sequence[Model]:
        """Models that the ranks do not have and should, though nobody suspended them."""
        lanes = [model for model in self._models.values() if model.lane.recovering]
        return [model for model in lanes if not model.lane.resuming]

    def attach(self, trainer: Trainer) -> None:
        """Use a rank group from now on."""
        self.place.set(trainer)
        if self.recovering:
            _log.info("%d model(s) have to be brought back", len(self.recovering))

    def detach(self, trainer: Trainer) -> None:
        """A rank group is gone, and with it the models as it held them."""
        if self.place.current is not trainer:
            return
        self.place.set(None)
        self.place.progress = "it went away and has to start again"
        for model in self._models.values():
            self._lose_trainer(model)

    def _lose_trainer(self, model: Model) -> None:
        """The ranks do not have a model any more: bring it back, where that can be done."""
        if self._journal.keeps:
            model.lane.lose_trainer()
        else:
            model.lane.close(model_lost(model.model_id))

    async def recall(
        self,
        stored: Sequence[StoredModel],
        deleted: Sequence[DeletedModel] = (),
        starts: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """Take up the models that the journal has, and remember those that were deleted, and what
        ended the ranks."""
        self._starts.recall(starts)
        if self._snapshots is not None:
            self._snapshots.epoch = self._journal.epoch
        for gone in deleted:
            self._recalled(gone).lane.close(model_not_found(gone.model_id))
        kept: list[str] = []
        for found in stored:
            model = self._models[found.model_id] = self._recalled(found)
            model.snapshots = list(found.snapshots)
            model.trimmed_to = found.trimmed_to
            model.last_request_time_s = found.last_request_time_s or model.create_time_s
            kept += [snapshot.folder for snapshot in found.snapshots]
            if found.lost:
                metadata = {"model_id": model.model_id}
                error = DataLoss(found.lost, Reason.MODEL_LOST, metadata=metadata)
                model.lane.close(error)
            await recall_calls(self._journal, model, found)
        if self._snapshots is not None:
            await self._snapshots.keep_only(kept)
        self._bring_back([model for model in self._models.values() if not model.lane.lost])
        if stored:
            _log.info("the journal has %d model(s)", len(stored))

    def _bring_back(self, models: Sequence[Model]) -> None:
        """After a start: those with calls first, then those used last; the others stay on disk."""
        first = sorted(models, key=_urgency, reverse=True)
        self._seats.seat_at_once(first)
        for model in first:
            if model in self._seats:
                model.lane.lose_trainer()
            else:
                model.lane.stay_suspended()

    def _recalled(self, found: StoredModel | DeletedModel) -> Model:
        model = Model.recalled(found.model_id, found.number, found.about)
        self._created_count = max(self._created_count, found.number)
        self._give_lane(model)
        self._creations.remember(model)
        return model

    def _rules(self, model: Model) -> ModelRules:
        return ModelRules(
            model,
            self._limits.calls,
            self.place,
            self._checkpoints,
            self._journal,
            self._snapshots,
            self._starts,
            self._seats,
        )

    def _give_lane(self, model: Model) -> None:
        limits, rules = self._limits.lane, self._rules(model)
        model.lane = Lane(model.model_id, limits, self._turns, self._journal, rules)

    # --- models -------------------------------------------------------------------------------

    async def create(self, request: NewModel) -> Model:
        """Create a model, or return the one that this `request_id` created before."""
        return await self._creations.once(
            request.request_id, request.digest, lambda: self._create(request)
        )

    async def _create(self, request: NewModel) -> Model:
        self.place.need()
        if request.path is None:
            assert request.tuning is not None  # one of the two is set by the servicer
            self._check_held(request.base_model)
            return await self._begin(request, request.tuning)
        if request.with_optimizer and request.path.kind is not CheckpointKind.TRAINING:
            raise wrong_kind(request.path)

        def check(found: CheckpointInfo) -> None:
            self._starts.check(key_of_checkpoint(found.digest))
            check_base_model(found.base_model, request.base_model)
            self._check_held(found.base_model)
            check_claim(found, self.place.need().info, self._limits.calls.rank_max)

        async with self._checkpoints.fetched(request.path, check) as (found, staged):
            return await self._begin(request, found.tuning, found, staged)

    def _check_held(self, base_model: str) -> None:
        name = self.place.need().info.name
        if base_model and base_model != name:
            message = f"no base model {base_model!r}; this cluster holds {name!r}"
            raise NotFound(message, Reason.BASE_MODEL_NOT_FOUND)

    async def _begin(
        self,
        request: NewModel,
        tuning: Tuning,
        found: CheckpointInfo | None = None,
        staged: Staged | None = None,
    ) -> Model:
        """Put a new model onto the ranks and write it down; from then on it is there."""
        trainer = self.place.need()
        step_count = found.step_count if found is not None and request.with_optimizer else 0
        key = key_of_checkpoint(found.digest) if found else key_of_request(request.request_id)
        self._created_count += 1
        model = Model(
            self._new_id(),
            trainer.info,
            tuning,
            request.user_metadata,
            self._created_count,
            trainer.identity,
            from_checkpoint=request.path is not None,
            request_id=request.request_id,
            request_digest=request.digest,
            step_count=step_count,
        )
        self._check_room()
        await self._seats.enter(model)
        try:
            if self.place.need() is not trainer:  # while it waited for its seat
                raise TrainerLost("the trainer was replaced")
            async with self._starts.attempt(key):
                await self._put(model, trainer, staged, optimizer=request.with_optimizer)
        except BaseException as error:
            self._seats.leave(model)
            if isinstance(error, TrainerLost | ModelBroken):
                self._starts.check(key)
                text = "the trainer was lost"
                raise Unavailable(text, Reason.TRAINER_UNAVAILABLE, retry_after_s=1.0) from error
            if isinstance(error, Fenced):
                raise shutting_down() from error
            raise
        return model

    async def _put(
        self, model: Model, trainer: Trainer, staged: Staged | None, *, optimizer: bool
    ) -> None:
        if staged is not None:
            await self._import(model, trainer, staged, optimizer=optimizer)
            return
        async with self._turn_of_new():
            await trainer.create_model(model.model_id, model.tuning)
            await self._write_down(model, trainer)

    @contextlib.asynccontextmanager
    async def _turn_of_new(self) -> AsyncIterator[None]:
        """A turn in which a model may be added."""
        async with self._turns.take(_COMING_AND_GOING, NOMINAL_TOKENS):
            self._check_room()
            yield

    async def _import(
        self, model: Model, trainer: Trainer, staged: Staged, *, optimizer: bool
    ) -> None:
        rules = self._rules(model)
        snapshot = await rules.keep(0, staged, optimizer, model.step_count)
        model.snapshots = [] if snapshot is None else [snapshot]
        try:
            async with self._checkpoints.copies.coming:
                pieces = await whole(staged)
                async with self._turn_of_new():
                    said = StateInfo(model.tuning, model.step_count)
                    await trainer.import_state(
                        model.model_id, pieces, optimizer=optimizer, create=True, said=said
                    )
                    await self._write_down(model, trainer)
        except BaseException:
            await rules.drop(snapshot)
            raise

    async def _write_down(self, model: Model, trainer: Trainer) -> None:
        writes: list[Write] = [AddModel(model.model_id, model.number, model.about())]
        writes += [AddSnapshot.of(model.model_id, snapshot) for snapshot in model.snapshots]
        try:
            await self._journal.commit(*writes)
        except BaseException:
            with contextlib.suppress(TrainerLost):
                await trainer.delete_model(model.model_id)
            raise
        self._give_lane(model)
        self._models[model.model_id] = model
        if self.place.current is not trainer:
            self._lose_trainer(model)

    def _check_room(self) -> None:
        if len(self._models) < self._limits.models_kept_max:
            return
        for model in list(self._models.values()):
            if model.lane.lost and not self._journal.keeps:  # only a tombstone; the oldest may go
                del self._models[model.model_id]
                self.on_deleted(model.model_id)
                return
        raise too_many_models("models_kept_max", self._limits.models_kept_max)

    def get(self, model_id: str) -> Model:
        """One model.

        Raises:
            NotFound: There is none of this id (MODEL_NOT_FOUND).
        """
        model = self._models.get(model_id)
        if model is None:
            raise model_not_found(model_id)
        return model

    def exists(self, model_id: str) -> bool:
        """Whether there is a model of this id."""
        return model_id in self._models

    def list(self) -> Sequence[Model]:
        """All models, newest first."""
        return list(reversed(self._models.values()))

    async def delete(self, model_id: str) -> None:
        """Delete a model; calls that still wait for it fail as not found."""
        model = self.get(model_id)
        try:
            await self._journal.commit(DeleteModel(model_id, remember=bool(model.request_id)))
        except Fenced as error:
            raise shutting_down() from error
        if self._models.pop(model_id, None) is None:
            return  # somebody else deleted it in the same moment
        was_lost = model.lane.lost
        gone = model_not_found(model_id)
        model.lane.close(gone)
        model.lane.forget()
        self._seats.give_up(model, gone)
        self.on_deleted(model_id)
        dropped = self._evict(model)
        self._later(self._sweep(model, dropped))
        if not was_lost or self._journal.keeps:
            await asyncio.shield(dropped)

    def _later(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._deletions.add(task)
        task.add_done_callback(self._deletions.discard)
        return task

    async def _sweep(self, model: Model, dropped: "asyncio.Task[None]") -> None:
        await asyncio.wait([dropped])
        # The call under way, or a snapshot, may still add some.
        await model.lane.ended()
        self._seats.leave(model)  # one that it got in its last moment
        await model.lane.rules.forget()

    def _evict(self, model: Model) -> "asyncio.Task[None]":
        """Make the ranks drop a model that is deleted or lost, and let another have its seat."""
        return self._later(self._drop(model))

    async def _drop(self, model: Model) -> None:
        trainer = self.place.current
        if trainer is not None and model in self._seats:
            async with self._turns.take(_COMING_AND_GOING, NOMINAL_TOKENS):
                with contextlib.suppress(TrainerLost):  # then it went with its trainer
                    await trainer.delete_model(model.model_id)
        self._seats.leave(model)

    async def drained(self, timeout_s: float) -> None:
        """Return once no call is under way, or after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not all(model.lane.idle for model in self._models.values()):
                    await asyncio.sleep(DRAIN_POLL_S)

    async def delete_idle(self) -> None:
        """Delete the models that no call used for `model_idle_ttl_s`."""
        oldest_s = time.monotonic() - self._limits.model_idle_ttl_s
        for model in list(self._models.values()):
            if model.last_used_s < oldest_s and model.lane.idle:
                _log.info("model %s was idle too long and is deleted", model.model_id)
                await self.delete(model.model_id)

    # --- calls on one model -------------------------------------------------------------------

    def submit(
        self, model: Model, seq_id: int, digest: bytes, work: Work, nbytes: int = 0
    ) -> Answer:
        """Queue a call; see `works` for what its answer holds."""
        if seq_id < 0:
            raise InvalidArgument("seq_id", f"{seq_id} is below 0")
        model.last_request_time_s, model.last_used_s = time.time(), time.monotonic()
        return model.lane.submit(seq_id, Call(digest, work, nbytes))


def _urgency(model: Model) -> tuple[bool, float]:
    """Which models come back first after a start: those with calls, then those used last."""
    return model.lane.pending > 0, model.last_request_time_s
