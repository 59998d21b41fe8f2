"""What the calls of a model do: `ModelRules` carries them out on the ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

from tinsmithd.checkpoint_client import CheckpointInfo, NewCheckpoint
from tinsmithd.domain import CheckpointKind, FullConfig
from tinsmithd.errors import FailedPrecondition, Reason, ResourceExhausted, TinsmithError
from tinsmithd.training.call.batches import NOMINAL_TOKENS, add_metrics, cut, parts
from tinsmithd.training.call.composition import Composition
from tinsmithd.training.call.counts import FORWARD, FORWARD_BACKWARD, REPLAY
from tinsmithd.training.call.work import ComputeWork, LoadWork, SaveWork, StepWork, Work
from tinsmithd.training.journal.journal import Journal
from tinsmithd.training.journal.records import AddSnapshot, StoredSnapshot, Trim
from tinsmithd.training.lane.interface import Done, Emit, TakeTurn
from tinsmithd.training.models.checkpoints import (
    Checkpoints,
    check_base_model,
    check_claim,
    wrong_kind,
)
from tinsmithd.training.models.model import Model
from tinsmithd.training.models.recovery import Recovery, SnapshotRule
from tinsmithd.training.models.seats import Seats
from tinsmithd.training.models.snapshots import Snapshots
from tinsmithd.training.models.staging import Staged, whole
from tinsmithd.training.models.starts import Starts, key_of_checkpoint
from tinsmithd.training.ranks.interface import StateInfo, Trainer, TrainerLost
from tinsmithd.training.ranks.place import TrainerPlace


@dataclass(frozen=True)
class CallLimits:
    """The names are those of the settings."""

    quantum_tokens: int
    journal_bytes_max: int
    snapshots: SnapshotRule
    rank_max: int = 256


class _Held:
    """Bytes of calls by position."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}
        self.nbytes = 0

    def add(self, position: int, nbytes: int) -> None:
        """Positions rise."""
        if nbytes:
            self._sizes[position] = nbytes
            self.nbytes += nbytes

    def drop(self, positions: Sequence[int]) -> None:
        """Not these."""
        for position in positions:
            self.nbytes -= self._sizes.pop(position, 0)

    def drop_until(self, end: int) -> None:
        """Not those up to this position."""
        while self._sizes and (first := next(iter(self._sizes))) <= end:
            self.drop([first])


class ModelRules:
    """See `scheduler.Rules`."""

    def __init__(
        self,
        model: Model,
        limits: CallLimits,
        place: TrainerPlace,
        checkpoints: Checkpoints,
        journal: Journal,
        snapshots: Snapshots | None,
        starts: Starts,
        seats: Seats,
    ) -> None:
        self._model = model
        self._limits = limits
        self._place = place
        self._checkpoints = checkpoints
        self._journal = journal
        self._snapshots = snapshots
        self._starts = starts
        self._recovery = Recovery(
            model, place, journal, snapshots, checkpoints.copies, self, limits.snapshots
        )
        self._seats = seats
        self._since_step, self._since_snapshot = _Held(), _Held()
        self._stepped_at = 0
        self._gradients = False

    # --- the lane's side ----------------------------------------------------------------------

    def check_room(self, nbytes: int) -> None:
        """Refuse a call that would make the journal of this model too large.

        Raises:
            ResourceExhausted: Its calls since the last snapshot are too many (STORAGE_FULL).
        """
        held = nbytes + self._since_step.nbytes
        # A call without data must get in: the step among them is what makes room.
        if nbytes and self._journal.keeps and held > self._limits.journal_bytes_max:
            raise ResourceExhausted(
                f"calls of this model without a snapshot hold {held} bytes, journal_bytes_max is "
                f"{self._limits.journal_bytes_max}: an optim_step lets a snapshot be taken",
                Reason.STORAGE_FULL,
                retry_after_s=1.0,
                metadata={"limit": "journal_bytes_max", "value": str(held)},
            )

    def wrote(self, position: int, nbytes: int) -> None:
        """A call was written down."""
        self._since_step.add(position, nbytes)
        self._since_snapshot.add(position, nbytes)

    def forgot(self, positions: Sequence[int]) -> None:
        """Calls were taken back, to be written down again, or are never made again."""
        for held in (self._since_step, self._since_snapshot):
            held.drop(positions)

    def stepped(self, position: int) -> None:
        """No gradients wait after this position, and a snapshot can be taken."""
        self._since_step.drop_until(position)
        self._stepped_at, self._gradients = position, False

    @property
    def has_gradients(self) -> bool:
        """Whether gradients wait for a step."""
        return self._gradients

    async def execute(
        self, position: int, seq_id: int, work: Work, emit: Emit, turn: TakeTurn
    ) -> Done:
        """Carry a call out on the ranks."""
        trainer = self._trainer()
        match work:
            case ComputeWork() | StepWork():
                call = f"seq_id {seq_id}" if seq_id else f"call {position} (without seq_id)"
                return await self.change(trainer, call, work, None, emit, turn)
            case SaveWork():
                return await self._save(trainer, work, turn)
            case LoadWork():
                return await self._load(trainer, position, work, turn)
        raise TypeError(type(work).__name__)

    def _trainer(self) -> Trainer:
        if self._place.current is None and self._journal.keeps:
            raise TrainerLost(self._place.progress)
        return self._place.need()

    async def restore(self, turn: TakeTurn) -> None:
        """Wait for ranks and bring the model to the state after the last recorded call."""
        self._model.state_message = "waits for a seat at the ranks"
        await self._seats.enter(self._model)
        await self._recovery.restore(turn)
        self._seats.is_back(self._model)
        self._place.counts.restored += 1

    async def suspend(self, turn: TakeTurn) -> None:
        """Take the model off the ranks, with a snapshot where one makes its return quicker."""
        # Gradients are in no snapshot: those that wait are computed again.
        await self._recovery.suspend(self._stepped_at, turn)
        self._place.counts.suspended += 1

    def left(self) -> None:
        """Let another model have the seat."""
        self._model.state_message = "is on disk; its next call brings it back"
        self._seats.leave(self._model)

    async def settled(self, position: int, work: Work, turn: TakeTurn) -> None:
        """Take a snapshot when one is due."""
        if isinstance(work, StepWork):
            self.stepped(position)
            if self._model.snapshots:
                self._since_snapshot.drop_until(self._model.snapshots[-1].position)
            full = 2 * self._since_snapshot.nbytes > self._limits.journal_bytes_max
            await self._recovery.stepped(position, turn, full=full)
        elif isinstance(work, LoadWork):
            self.stepped(position)
            await self._recovery.sweep()

    async def forget(self) -> None:
        """The model is deleted and its lane has ended: remove its snapshots."""
        await self._recovery.forget()

    # --- calls that change the model on the ranks ---------------------------------------------

    async def change(
        self,
        trainer: Trainer,
        call: str,
        work: ComputeWork | StepWork,
        composition: Composition | None,
        emit: Emit,
        turn: TakeTurn,
    ) -> Done:
        """Compute, or step; in a given composition, it is the same again."""
        if isinstance(work, ComputeWork):
            return await self._compute(trainer, call, work, composition, emit, turn)
        done = await self._step(trainer, work, turn)
        self._place.counts.steps += composition is None and done.error is None
        return done

    async def _compute(
        self,
        trainer: Trainer,
        call: str,
        work: ComputeWork,
        composition: Composition | None,
        emit: Emit,
        turn: TakeTurn,
    ) -> Done:
        counts = (
            composition.counts if composition else cut(work.lengths, self._limits.quantum_tokens)
        )
        metrics: dict[str, float] = {}
        plans: list[bytes] = []
        engine_s = 0.0
        kind = REPLAY if composition else FORWARD_BACKWARD if work.backward else FORWARD
        for index, (part, some) in enumerate(parts(work, counts)):
            plan = composition.plans[index] if composition else b""
            tokens = sum(some.lengths)
            async with turn(tokens):
                computed = await trainer.compute(
                    self._model.model_id, some, part=part, plan=plan, on_result=emit
                )
            add_metrics(metrics, computed.metrics)
            plans.append(computed.plan)
            engine_s += computed.engine_s
            self._place.counts.computed(kind, tokens, computed.engine_s)
            if work.backward and computed.non_finite and not self._model.non_finite_since:
                self._model.non_finite_since = call
        if not work.backward:  # nothing changed: there is nothing to make again
            return Done({"metrics": metrics}, engine_s=engine_s)
        self._gradients = True
        made = Composition(trainer.identity, counts, plans, metrics)
        return Done({"metrics": metrics}, plan=made.encode(), engine_s=engine_s)

    async def _step(self, trainer: Trainer, work: StepWork, turn: TakeTurn) -> Done:
        try:
            async with turn(NOMINAL_TOKENS):
                metrics = await trainer.optim_step(self._model.model_id, work.adam)
        except FailedPrecondition as error:
            if error.reason is not Reason.NON_FINITE_GRADIENT:
                raise
            since = self._model.non_finite_since
            self._model.non_finite_since = ""
            if since:
                error.message += f"; they became so with {since}"
                error.metadata["since"] = since
            return Done(error=error, plan=Composition(trainer.identity).encode())
        self._model.non_finite_since = ""
        self._model.step_count += 1
        made = Composition(trainer.identity, metrics=metrics)
        return Done({"metrics": dict(metrics)}, plan=made.encode())

    # --- checkpoints --------------------------------------------------------------------------

    async def _save(self, trainer: Trainer, work: SaveWork, turn: TakeTurn) -> Done:
        # Made again after a crash, this is the same request to the Checkpoint server, which knows
        # it again.
        model, options = self._model, work.options
        new = NewCheckpoint(
            path=options.path,
            base_model=model.info.name,
            tuning=model.tuning,
            step_count=model.step_count,
            ttl_seconds=options.ttl_seconds,
            overwrite=options.overwrite,
            user_metadata=options.user_metadata,
            request_id=options.request_id,
            ephemeral=options.ephemeral,
            lease_id=options.lease_id,
        )
        optimizer = options.path.kind is CheckpointKind.TRAINING
        async with self._checkpoints.staging.open() as staged:
            async with self._checkpoints.copies.leaving:
                async with turn(NOMINAL_TOKENS):
                    sending = await trainer.snapshot(
                        model.model_id, optimizer=optimizer, on_piece=staged.write
                    )
                await sending
            # What others can see must not rest on results that this process alone knows.
            await self._journal.flush()
            saved = await self._checkpoints.save(new, staged)
        value = {"path": str(options.path), "size_bytes": saved.size_bytes}
        return Done({**value, "digest": saved.digest.hex()})

    async def _load(self, trainer: Trainer, position: int, work: LoadWork, turn: TakeTurn) -> Done:
        model = self._model
        if work.path.kind is not CheckpointKind.TRAINING:
            raise wrong_kind(work.path)
        async with self._checkpoints.fetched(work.path, self._check_fits) as (found, staged):
            step_count = found.step_count if work.optimizer else 0
            said = StateInfo(found.tuning, step_count)
            key = key_of_checkpoint(found.digest)
            await self._recovery.quiet()  # one of before must not come to count after this one
            # The checkpoint may be deleted or replaced later: what was loaded is a snapshot, which
            # is written first, since what the ranks have taken in cannot be undone.
            snapshot = await self.keep(position, staged, work.optimizer, step_count)
            try:
                async with self._checkpoints.copies.coming:
                    pieces = await whole(staged)
                    async with turn(NOMINAL_TOKENS), self._starts.attempt(key):
                        await trainer.import_state(
                            model.model_id,
                            pieces,
                            optimizer=work.optimizer,
                            create=False,
                            said=said,
                        )
                    del pieces
            except BaseException:
                await self.drop(snapshot)
                raise
        model.step_count, model.non_finite_since = step_count, ""
        value = {"path": str(work.path)}
        if snapshot is None:
            return Done(value)
        # Not removed yet: the journal still refers to them.
        model.garbage += [old.folder for old in model.snapshots]
        model.snapshots, model.trimmed_to = [snapshot], position
        self._recovery.loaded(step_count)
        trim = Trim(model.model_id, position)
        return Done(value, writes=[AddSnapshot.of(model.model_id, snapshot), trim])

    def _check_fits(self, found: CheckpointInfo) -> None:
        self._starts.check(key_of_checkpoint(found.digest))
        check_base_model(found.base_model, self._model.info.name)
        check_claim(found, self._model.info, self._limits.rank_max)
        if isinstance(found.tuning, FullConfig) != isinstance(self._model.tuning, FullConfig):
            message = "of checkpoint and model, one is an adapter and the other all weights"
            raise FailedPrecondition(message, Reason.INCOMPATIBLE_CHECKPOINT)

    async def keep(
        self, position: int, staged: Staged, optimizer: bool, step_count: int
    ) -> StoredSnapshot | None:
        """Write files of a checkpoint as a snapshot; None where nothing is kept.

        Raises:
            ResourceExhausted: The disk is full (STORAGE_FULL).
        """
        if self._snapshots is None:
            return None
        draft = self._snapshots.begin(self._model.model_id, position)
        try:
            async for name, data in staged.pieces():
                await draft.write(name, data)
            folder = await draft.finish(optimizer=optimizer, step_count=step_count)
        except OSError as error:
            await draft.discard()
            message = f"a snapshot cannot be written: {error}"
            raise ResourceExhausted(message, Reason.STORAGE_FULL, retry_after_s=1.0) from error
        except TinsmithError:
            await draft.discard()
            raise
        return StoredSnapshot(position, step_count, folder)

    async def drop(self, snapshot: StoredSnapshot | None) -> None:
        """Remove a snapshot's files."""
        if snapshot is not None and self._snapshots is not None:
            await self._snapshots.remove(snapshot.folder)
