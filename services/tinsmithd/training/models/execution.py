"""What the calls of a model do: `ModelExecutor` carries them out on the ranks."""

import dataclasses
import time
from collections.abc import Sequence

from tinsmithd.domain import CheckpointInfo, CheckpointKind
from tinsmithd.errors import FailedPrecondition, Reason
from tinsmithd.saves import NewCheckpoint
from tinsmithd.training.call import (
    NOMINAL_TOKENS,
    ComputeWork,
    LoadWork,
    SaveWork,
    StepWork,
    Work,
)
from tinsmithd.training.journal import AddStep, StoredStep
from tinsmithd.training.lane import Effect, Lane, LaneContext, TakeTurn
from tinsmithd.training.models.changes import Changes
from tinsmithd.training.models.checkpoints import check_base_model, check_claim, wrong_kind
from tinsmithd.training.models.journal_room import JournalRoom
from tinsmithd.training.models.model import Model
from tinsmithd.training.models.model_snapshots import ModelSnapshots
from tinsmithd.training.models.recovery import Recovery
from tinsmithd.training.models.shared import Shared
from tinsmithd.training.models.snapshot_taker import SnapshotTaker
from tinsmithd.training.models.staging import whole
from tinsmithd.training.models.starts import key_of_checkpoint
from tinsmithd.training.ranks import OnOutput, RankGroup, RankGroupLost, StateInfo


def give_lane(model: Model, snapshots: ModelSnapshots, shared: Shared) -> None:
    """Let a model take calls from now on."""
    executor = ModelExecutor(model, snapshots, shared)
    context = LaneContext(
        *(model.model_id, shared.limits.lane, shared.journal, executor),
        admit=lambda call, is_next: shared.quotas.admit(model, call, is_next=is_next),
        queued=shared.quotas.queued_of(model.owner),
        census=shared.census,
    )
    model.open(Lane(context, shared.turns))


class ModelExecutor:
    """Carries out the calls of one model; see `CallExecutor`."""

    def __init__(self, model: Model, snapshots: ModelSnapshots, shared: Shared) -> None:
        limits = shared.limits.calls
        self._model = model
        self._rank_max = limits.rank_max
        self._steps_kept_max = limits.steps_kept_max
        self._place = shared.place
        self._checkpoints = shared.checkpoints
        self._journal = shared.journal
        self._starts = shared.starts
        self._seats = shared.seats
        self._snapshots = snapshots
        self._room = JournalRoom(limits.journal_bytes_max, keeps=shared.journal.keeps)
        self._changes = Changes(model, shared.place.counts, limits.quantum_tokens)
        self._taker = SnapshotTaker(model, snapshots, shared)
        self._recovery = Recovery(
            *(model, snapshots, self._taker, shared),
            replay=self._changes.make,
            stepped=self._stepped,
        )

    # --- the lane's side ----------------------------------------------------------------------

    def check_room(self, nbytes: int) -> None:
        """Refuse a call that would make the journal of this model too large."""
        self._room.check(nbytes)

    def wrote(self, position: int, nbytes: int) -> None:
        """The journal was given a call."""
        self._room.wrote(position, nbytes)

    def forgot(self, positions: Sequence[int]) -> None:
        """Calls were taken back, to be written again, or are never made again."""
        self._room.forgot(positions)

    @property
    def has_gradients(self) -> bool:
        """Whether the model has pending gradients."""
        return self._changes.has_gradients

    async def execute(
        self, position: int, seq_id: int, work: Work, on_output: OnOutput, turn: TakeTurn
    ) -> Effect:
        """Carry a call out on the ranks."""
        group = self._group()
        match work:
            case ComputeWork() | StepWork():
                call = f"seq_id {seq_id}" if seq_id else f"call {position} (without seq_id)"
                effect = await self._changes.make(group, call, work, None, on_output, turn)
                if isinstance(work, StepWork) and effect.error is None:
                    step = self._step_made(position, seq_id, work, effect)
                    return Effect(effect.value, composition=effect.composition, writes=[step])
                return effect
            case SaveWork():
                return await self._save(group, work, turn)
            case LoadWork():
                return await self._load(group, position, work, turn)
        raise TypeError(type(work).__name__)

    def _step_made(self, position: int, seq_id: int, work: StepWork, effect: Effect) -> AddStep:
        """What is remembered of a step."""
        metrics = {
            **effect.value["metrics"],
            **self._changes.pending,
            "learning_rate:last": work.adam.learning_rate,
        }
        step = StoredStep(position, seq_id, self._model.step_count, time.time(), metrics)
        return AddStep(self._model.model_id, step, self._steps_kept_max)

    def _group(self) -> RankGroup:
        if self._place.current is None and self._journal.keeps:
            raise RankGroupLost(self._place.progress)
        return self._place.need()

    async def restore(self, turn: TakeTurn) -> None:
        """Wait for ranks and bring the model to the state after the last recorded call."""
        self._model.doing("waits for a seat at the ranks")
        await self._seats.enter(self._model)
        await self._recovery.restore(turn)
        self._seats.is_back(self._model)
        self._place.counts.restored += 1

    async def suspend(self, turn: TakeTurn) -> None:
        """Take the model off the ranks, with a snapshot where one makes its return quicker."""
        await self._taker.quiet()
        # No snapshot has gradients: those that are pending are computed again.
        await self._taker.resting(self._changes.stepped_at, turn)
        group = self._place.current
        if group is not None:
            async with turn(NOMINAL_TOKENS):
                await group.delete_model(self._model.model_id)
        self._place.counts.suspended += 1

    async def rest(self, turn: TakeTurn) -> None:
        """Take a snapshot of a model that fell idle, if it made steps since the last one."""
        await self._taker.resting(self._changes.stepped_at, turn)

    def left(self) -> None:
        """Let another model have the seat."""
        self._model.doing("is on disk; its next call brings it back")
        self._seats.leave(self._model)

    async def settled(self, position: int, work: Work, turn: TakeTurn) -> None:
        """Take a snapshot when one is due."""
        if isinstance(work, StepWork):
            self._stepped(position)
            if self._snapshots.newest is not None:
                self._room.snapshot_at(self._snapshots.newest.position)
            await self._taker.stepped(position, turn, full=self._room.filling)
        elif isinstance(work, LoadWork):
            self._stepped(position)
            await self._snapshots.sweep()

    def _stepped(self, position: int) -> None:
        self._room.stepped(position)
        self._changes.stepped(position)

    async def forget(self) -> None:
        """The model is deleted and its lane has ended: remove its snapshots."""
        await self._taker.quiet()
        self._taker.forget()
        await self._snapshots.forget()

    # --- checkpoints --------------------------------------------------------------------------

    async def _save(self, group: RankGroup, work: SaveWork, turn: TakeTurn) -> Effect:
        # A save that is made again after a crash is the same request to the Checkpoint server,
        # which knows it again.
        model = self._model
        # In calls paths are as callers say them.
        options = dataclasses.replace(work.options, path=work.options.path.of(model.owner))
        new = NewCheckpoint(options, model.info.name, model.tuning, model.step_count)
        optimizer = options.path.kind is CheckpointKind.TRAINING
        # What others can see must not rest on answers that this process alone knows.
        before_commit = self._journal.flush
        async with (
            self._checkpoints.staging.open() as staged,
            self._checkpoints.deposits.open() as deposit,
            self._checkpoints.saving(new, staged, deposit, before_commit) as saving,
        ):
            async with self._checkpoints.copies.leaving:
                async with turn(NOMINAL_TOKENS):
                    sending = await group.copy_state(
                        model.model_id,
                        optimizer=optimizer,
                        on_piece=staged.write,
                        deposit="" if deposit is None else deposit.folder,
                    )
                    if deposit is not None:
                        deposit.begun.set()
                sent = await sending
            if deposit is not None:
                deposit.files = sent.deposited
            saved = await saving()
        value = {"path": str(options.path), "size_bytes": saved.size_bytes}
        return Effect({**value, "digest": saved.digest.hex()})

    async def _load(
        self, group: RankGroup, position: int, work: LoadWork, turn: TakeTurn
    ) -> Effect:
        model = self._model
        path = work.path.of(model.owner)
        if path.kind is not CheckpointKind.TRAINING:
            raise wrong_kind(path)
        async with self._checkpoints.fetched(path, self._check_fits) as (found, staged):
            step_count = found.step_count if work.optimizer else 0
            said = StateInfo(found.tuning, step_count)
            key = key_of_checkpoint(found.digest)
            await self._taker.quiet()  # an earlier snapshot must not come to count after this one
            # The checkpoint may be deleted or replaced later: what was loaded is a snapshot. It is
            # written first, since nobody can undo what the ranks have taken in.
            snapshot = await self._snapshots.copy(
                position, staged, optimizer=work.optimizer, step_count=step_count
            )
            try:
                async with self._checkpoints.copies.coming:
                    pieces = await whole(staged)
                    async with turn(NOMINAL_TOKENS), self._starts.attempt(key):
                        await group.import_state(
                            model.model_id,
                            pieces,
                            optimizer=work.optimizer,
                            create=False,
                            said=said,
                        )
                    del pieces
            except BaseException:
                await self._snapshots.remove(snapshot)
                raise
        model.set_state(step_count)
        value = {"path": str(path)}
        if snapshot is None:
            return Effect(value)
        self._taker.loaded(step_count)
        return Effect(value, writes=self._snapshots.replace_with(snapshot))

    def _check_fits(self, found: CheckpointInfo) -> None:
        self._starts.check(key_of_checkpoint(found.digest))
        check_base_model(found.base_model, self._model.info.name)
        check_claim(found, self._model.info, self._rank_max)
        if message := self._model.tuning.mismatch(found.tuning):
            raise FailedPrecondition(message, Reason.INCOMPATIBLE_CHECKPOINT)
