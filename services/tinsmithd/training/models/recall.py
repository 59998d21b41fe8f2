"""Takes models up where an earlier process left them.

Most of them are at rest. Of such a one a start reads its newest calls; the others, which say what
its repeats are answered, are read when it is called.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence

from tinsmithd.errors import DataLoss, Reason
from tinsmithd.training.call import StoredAnswer, Work, model_lost, model_not_found, shutting_down
from tinsmithd.training.journal import (
    DeletedModel,
    Fenced,
    Journal,
    LoseModel,
    ParkedCall,
    StoreDamaged,
    StoredModel,
)
from tinsmithd.training.lane import ReadAnswer
from tinsmithd.training.models.creation import Creation
from tinsmithd.training.models.execution import give_lane
from tinsmithd.training.models.model import Model
from tinsmithd.training.models.model_snapshots import ModelSnapshots
from tinsmithd.training.models.registry import Registry
from tinsmithd.training.models.shared import Shared

_log = logging.getLogger(__name__)


class Recall:
    """Reads the journal at a start.

    Args:
        shared: What models share.
        registry: Where models are then.
        creation: Told which requests created models before.
    """

    def __init__(self, shared: Shared, registry: Registry, creation: Creation) -> None:
        self._shared = shared
        self._registry = registry
        self._creation = creation
        self._waking: dict[str, asyncio.Task[None]] = {}

    async def recall(
        self,
        stored: Sequence[StoredModel],
        deleted: Sequence[DeletedModel],
        starts: Mapping[str, int],
        used_ids: Sequence[str],
    ) -> None:
        """Take up the models that the journal has.

        Args:
            stored: These models.
            deleted: Those that were deleted and are remembered.
            starts: What ended ranks, see `Starts`.
            used_ids: Chosen ids of models that were deleted, oldest first.
        """
        shared = self._shared
        for model_id in used_ids:
            self._registry.used_id(model_id)
        shared.starts.recall(starts)
        if shared.snapshot_store is not None:
            shared.snapshot_store.epoch = shared.journal.epoch
        for gone in deleted:
            model = Model.recalled(gone.model_id, gone.number, gone.about)
            give_lane(model, self._snapshots_of(gone.model_id), shared)
            self._creation.remember(model)
            model.lane.close(model_not_found(model.public_id))
        for found in stored:
            await self._recall(found)
        if shared.snapshot_store is not None:
            kept = [snapshot.folder for found in stored for snapshot in found.snapshots]
            await shared.snapshot_store.keep_only(kept)
        self._bring_back()
        if stored:
            _log.info("the journal has %d model(s)", len(stored))

    def _snapshots_of(self, model_id: str, found: StoredModel | None = None) -> ModelSnapshots:
        journal, store = self._shared.journal, self._shared.snapshot_store
        if found is None:
            return ModelSnapshots(model_id, journal, store)
        return ModelSnapshots(model_id, journal, store, found.snapshots, found.trimmed_to)

    async def _recall(self, found: StoredModel) -> None:
        time_s = found.last_request_time_s
        model = Model.recalled(found.model_id, found.number, found.about, time_s)
        give_lane(model, self._snapshots_of(found.model_id, found), self._shared)
        if found.snapshots:  # its state until the calls since then are replayed
            model.set_state(found.snapshots[-1].step_count)
        self._creation.remember(model)
        self._registry.add(model)
        if found.lost:
            metadata = {"model_id": model.public_id}
            model.lane.close(DataLoss(found.lost, Reason.MODEL_LOST, metadata=metadata))
        model.asleep = found.asleep
        if found.asleep:
            model.lane.begin_after(found.calls)
        else:
            await _recall_calls(self._shared.journal, model, found)

    async def wake(self, model: Model) -> None:
        """Read the calls of a model that is asleep; whoever asks meanwhile waits for the same.

        Raises:
            Unavailable: This process ends (SHUTTING_DOWN).
        """
        waking = self._waking.get(model.model_id)
        if waking is None:
            waking = self._waking[model.model_id] = asyncio.create_task(self._wake(model))
            waking.add_done_callback(lambda _: self._waking.pop(model.model_id, None))
        await asyncio.shield(waking)

    async def _wake(self, model: Model) -> None:
        journal = self._shared.journal
        try:
            calls = await journal.calls(model.model_id)
        except Fenced as error:
            raise shutting_down() from error
        except StoreDamaged as error:
            _log.error("model %s is lost: %s", model.log_name, error)
            lost = model_lost(model.model_id, str(error))
            await journal.commit(LoseModel(model.model_id, lost.message), must=True)
            model.lane.close(lost)
        else:
            model.lane.recall(calls, {}, (), _reader(journal, model))
        model.asleep = False

    def _bring_back(self) -> None:
        """Those with calls, of them those used last first; the others stay on disk."""
        models = [model for model in self._registry.oldest_first if not model.lane.lost]
        models.sort(key=lambda model: model.last_request_time_s, reverse=True)
        self._shared.seats.seat_at_once(model for model in models if model.lane.pending)
        for model in models:
            if model in self._shared.seats:
                model.lane.lose_ranks()
            else:
                model.lane.stay_suspended()


async def _recall_calls(journal: Journal, model: Model, found: StoredModel) -> None:
    """Give a model's lane what the journal has of its calls."""
    works: dict[int, Work] = {}
    parked: Sequence[ParkedCall] = ()
    try:
        for call in found.calls:
            if call.answer_digest is None and not found.lost:
                works[call.position] = await journal.work(model.model_id, call.position)
        if found.parked:
            parked = await journal.parked(model.model_id)
    except StoreDamaged as error:
        _log.error("model %s is lost: %s", model.log_name, error)
        # Its answers stay: what was acknowledged can be asked for again.
        model.lane.close(model_lost(model.model_id, str(error)))

    model.lane.recall(found.calls, works, parked, _reader(journal, model))


def _reader(journal: Journal, model: Model) -> ReadAnswer:
    """Reads a model's recorded answers."""

    def read(position: int) -> Callable[[], Awaitable[StoredAnswer]]:
        async def answer() -> StoredAnswer:
            try:
                return await journal.answer(model.model_id, position)
            except Fenced as error:
                raise shutting_down() from error

        return answer

    return read
