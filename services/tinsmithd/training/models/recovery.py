"""Brings a model back to the ranks, bit for bit, and takes the snapshots that make it quick.

A model comes back from the newest snapshot that verifies, and from the calls after it, which are
made again as they were made first: same data, same composition, same order. What each gives is held
against what it gave then. Two snapshots are kept, and the journal behind the older one is dropped,
so that one damaged snapshot costs time and nothing else.
"""

import asyncio
import logging
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tinsmithd import failpoints
from tinsmithd.errors import Reason, TinsmithError, Unavailable
from tinsmithd.training.call.batches import NOMINAL_TOKENS
from tinsmithd.training.call.composition import Composition, are_close, differing
from tinsmithd.training.call.work import ComputeWork, Outcome, StepWork, digest_of
from tinsmithd.training.journal.journal import Journal
from tinsmithd.training.journal.records import (
    AddSnapshot,
    Fenced,
    StoreDamaged,
    StoredCall,
    StoredSnapshot,
    Trim,
)
from tinsmithd.training.lane.interface import Done, Emit, TakeTurn, model_lost
from tinsmithd.training.models.model import Model
from tinsmithd.training.models.snapshots import Draft, Snapshot, Snapshots
from tinsmithd.training.models.staging import Copies
from tinsmithd.training.ranks.interface import StateInfo, Trainer, TrainerLost
from tinsmithd.training.ranks.place import TrainerPlace

BASE_KEYS = ("base_model", "dtype")
"""Of an identity: a model without calls to make again needs these alone to be the same."""
CLOSE_KEYS = (*BASE_KEYS, "engine", "world_size", "zero_stage")
"""Where replays are held to be close, calls to be made again need these to be the same."""
PAUSE_S_MAX = 60.0
"""A model during whose return ranks die again and again lets others go first for so long."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SnapshotRule:
    """When a snapshot is taken: with the step after so many steps, or after so long.

    With `exact` what is made again must give the same bits, on ranks of one identity; else the same
    metrics but for rounding. No GPU is held to bits: many kernels there add up in any order.
    """

    steps: int
    interval_s: float
    exact: bool = True


class Changes(Protocol):
    """Makes calls on the ranks, in a given composition."""

    async def change(
        self,
        trainer: Trainer,
        call: str,
        work: ComputeWork | StepWork,
        composition: Composition | None,
        emit: Emit,
        turn: TakeTurn,
    ) -> Done:
        """Compute, or step."""

    def stepped(self, position: int) -> None:
        """No gradients wait after this position."""


class Recovery:
    """Recovery and snapshots of one model."""

    def __init__(
        self,
        model: Model,
        place: TrainerPlace,
        journal: Journal,
        snapshots: Snapshots | None,
        copies: Copies,
        changes: Changes,
        rule: SnapshotRule,
    ) -> None:
        self._model = model
        self._place = place
        self._journal = journal
        self._snapshots = snapshots
        self._copies = copies
        self._changes = changes
        self._rule = rule
        self._taken_step = model.snapshots[-1].step_count if model.snapshots else model.step_count
        self._taken_s = 0.0
        self._taking: asyncio.Task[None] | None = None
        self._failures = 0
        self._said: Sequence[str] = ()

    # --- back to the ranks --------------------------------------------------------------------

    async def restore(self, turn: TakeTurn) -> None:
        """Wait for ranks and bring the model to the state after the last recorded call."""
        model = self._model
        model.state_message = "waits for the trainer"
        if self._failures > 1:
            await asyncio.sleep(min(2.0**self._failures, PAUSE_S_MAX))
        trainer = await self._place.wait()
        try:
            await self._journal.flush()
            await self._restore(trainer, turn)
        except TrainerLost as error:
            self._failures += error.blamed
            raise
        self._failures = 0
        model.state_message = ""

    async def _restore(self, trainer: Trainer, turn: TakeTurn) -> None:
        model = self._model
        # What it finds must not be trimmed meanwhile.
        await self.quiet()
        try:
            stored = await self._journal.calls(model.model_id)
        except StoreDamaged as error:
            raise model_lost(model.model_id, str(error)) from error
        async with self._copies.coming:
            begin, snapshot = await self._newest()
            calls = [
                (call, Composition.decode(call.plan))
                for call in stored
                if call.position > begin and call.plan
            ]
            self._check_fits(trainer, [composition for _, composition in calls])
            model.state_message = f"is brought back, {len(calls)} calls after its snapshot"
            async with turn(NOMINAL_TOKENS):
                await trainer.delete_model(model.model_id)
                if snapshot is None:
                    await trainer.create_model(model.model_id, model.tuning)
                else:
                    await trainer.import_state(
                        model.model_id,
                        snapshot.pieces,
                        optimizer=snapshot.optimizer,
                        create=True,
                        said=None,
                    )
            snapshot_step = model.step_count = 0 if snapshot is None else snapshot.step_count
            del snapshot
        self._changes.stepped(begin)
        model.non_finite_since = ""
        for index, (call, composition) in enumerate(calls):
            model.state_message = f"is brought back, call {index + 1} of {len(calls)}"
            await self._replay(trainer, call, composition, turn)
            failpoints.hit("restore_mid")
        _log.info(
            "model %s is back at step %d: snapshot of step %d and %d calls",
            *(model.model_id, model.step_count, snapshot_step, len(calls)),
        )

    async def _newest(self) -> tuple[int, Snapshot | None]:
        """The newest snapshot that verifies, with its position; None for the model's beginning."""
        model = self._model
        assert self._snapshots is not None
        for found in reversed(list(model.snapshots)):
            try:
                return found.position, await self._snapshots.read(found.folder)
            except StoreDamaged as error:
                _log.error("model %s: %s", model.model_id, error)
                # The next one is taken soon, and must not count on this one.
                model.snapshots.remove(found)
                model.garbage.append(found.folder)
                self._taken_step = found.step_count - self._rule.steps
        if model.from_checkpoint or model.trimmed_to:
            raise model_lost(model.model_id, "no snapshot of it is whole")
        return 0, None

    def _check_fits(self, trainer: Trainer, compositions: Sequence[Composition]) -> None:
        identity = trainer.identity
        keys = () if self._is_exact(trainer) else CLOSE_KEYS
        pairs: list[tuple[Mapping[str, str], Sequence[str]]] = [(self._model.identity, BASE_KEYS)]
        pairs += [(composition.identity, keys) for composition in compositions]
        for ours, compared in pairs:
            what = differing(ours, identity, compared)
            if what:
                raise self._mismatch(what, ours, identity)

    def _mismatch(
        self, keys: Sequence[str], ours: Mapping[str, str], theirs: Mapping[str, str]
    ) -> Unavailable:
        """The ranks are of another kind. Callers hear which settings differ, and the log how."""
        differ = f"{', '.join(keys)} {'differs' if len(keys) == 1 else 'differ'}"
        message = f"model {self._model.model_id} cannot go on with this trainer: {differ}"
        was = [
            f"{key} was {ours.get(key, 'unset')} and is {theirs.get(key, 'unset')}" for key in keys
        ]
        if was != self._said:  # it is tried again and again
            _log.error("model %s: %s", self._model.model_id, "; ".join(was))
            self._said = was
        self._model.state_message = message
        return Unavailable(message, Reason.TRAINER_MISMATCH, retry_after_s=5.0)

    def _is_exact(self, trainer: Trainer) -> bool:
        return self._rule.exact and trainer.identity.get("device", "cpu") == "cpu"

    async def _replay(
        self, trainer: Trainer, call: StoredCall, composition: Composition, turn: TakeTurn
    ) -> None:
        model = self._model
        try:
            work = await self._journal.work(model.model_id, call.position)
        except StoreDamaged as error:
            raise model_lost(model.model_id, str(error)) from error
        if not isinstance(work, ComputeWork | StepWork):
            raise TypeError(f"call {call.position} changes nothing on the ranks: {work.kind}")
        given: list[bytes] = []
        name = f"seq_id {call.seq_id}" if call.seq_id else f"call {call.position}"
        done = await self._changes.change(trainer, name, work, composition, given.append, turn)
        outcome = Outcome(given, done.value) if done.error is None else Outcome(error=done.error)
        same = digest_of(outcome) == call.result_digest
        if not same and not self._is_exact(trainer):
            same = are_close(composition.metrics, done.value.get("metrics", {}))
        if not same:
            why = f"{name} gave another result than it gave before"
            raise model_lost(model.model_id, why)
        if isinstance(work, StepWork):
            self._changes.stepped(call.position)

    # --- snapshots ----------------------------------------------------------------------------

    async def quiet(self) -> None:
        """Wait until no snapshot is on its way."""
        if self._taking is not None:
            await asyncio.wait([self._taking])

    async def sweep(self) -> None:
        """Remove the files of snapshots that the journal does not refer to any more."""
        if self._model.garbage:
            await self._journal.flush()
            await self._remove_garbage()

    async def forget(self) -> None:
        """The model is deleted: remove all of its snapshots."""
        await self.quiet()
        self._model.garbage += [snapshot.folder for snapshot in self._model.snapshots]
        await self._remove_garbage()

    async def _remove_garbage(self) -> None:
        if self._snapshots is not None:
            garbage, self._model.garbage = self._model.garbage, []
            for folder in garbage:
                await self._snapshots.remove(folder)

    def loaded(self, step_count: int) -> None:
        """A checkpoint was loaded, and is a snapshot."""
        self._taken_step = step_count

    async def stepped(self, position: int, turn: TakeTurn, *, full: bool) -> None:
        """After a step, which leaves no gradients: take a snapshot when one is due.

        Returns as soon as the ranks have copied the state.
        """
        model = self._model
        steps = model.step_count - self._taken_step
        now_s = asyncio.get_running_loop().time()
        self._taken_s = self._taken_s or now_s
        late = now_s - self._taken_s > self._rule.interval_s
        if self._snapshots is None or self._taking is not None or steps < 1:
            return
        if steps < self._rule.steps and not late and not full:
            return
        if await self._snapshot(position, turn):
            self._taken_s = now_s

    async def suspend(self, position: int, turn: TakeTurn) -> None:
        """Take the model off the ranks, with a snapshot first where it has made steps since one.

        Args:
            position: No call after this one changed more than the waiting gradients.
            turn: Gives a turn.
        """
        await self.quiet()
        model = self._model
        newest = model.snapshots[-1].position if model.snapshots else 0
        if position > newest and model.step_count > self._taken_step:
            await self._snapshot(position, turn)
        trainer = self._place.current
        if trainer is not None:
            async with turn(NOMINAL_TOKENS):
                await trainer.delete_model(model.model_id)

    async def _snapshot(self, position: int, turn: TakeTurn) -> bool:
        """Let the ranks copy the state, which is then written; False where they cannot."""
        model, trainer = self._model, self._place.current
        if trainer is None or self._snapshots is None:
            return False
        draft = self._snapshots.begin(model.model_id, position)
        await self._copies.leaving.acquire()
        try:
            async with turn(NOMINAL_TOKENS):
                sending = await trainer.snapshot(
                    model.model_id, optimizer=True, on_piece=draft.write
                )
        except BaseException as error:
            self._copies.leaving.release()
            if not isinstance(error, TinsmithError):
                raise
            _log.warning("no snapshot of model %s: %s", model.model_id, error)
            return False
        self._taken_step = model.step_count
        self._taking = asyncio.create_task(self._take(position, draft, sending))
        return True

    async def _take(self, position: int, draft: Draft, sending: Awaitable[StateInfo]) -> None:
        model = self._model
        assert self._snapshots is not None
        folder = ""
        try:
            try:
                state = await sending
            finally:
                self._copies.leaving.release()
            folder = await draft.finish(optimizer=True, step_count=state.step_count)
            await self._snapshots.verify(folder)
            snapshot = StoredSnapshot(position, state.step_count, folder)
            older = model.snapshots[-1:]
            trim = [Trim(model.model_id, old.position) for old in older]
            await self._journal.commit(AddSnapshot.of(model.model_id, snapshot), *trim)
        except (TinsmithError, TrainerLost, StoreDamaged, OSError, Fenced) as error:
            _log.warning("no snapshot of model %s: %s", model.model_id, error)
            await draft.discard()
            if folder:
                await self._snapshots.remove(folder)
        else:
            model.garbage += [old.folder for old in model.snapshots[:-1]]
            model.snapshots = [*older, snapshot]
            if older:
                model.trimmed_to = older[0].position
            await self._remove_garbage()
        finally:
            self._taking = None
