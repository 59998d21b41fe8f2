"""Takes snapshots of one model: the ranks copy its state within a turn and send it after that."""

import asyncio
import logging
import time
from collections.abc import Awaitable

from tinsmithd.errors import TinsmithError
from tinsmithd.training.call import NOMINAL_TOKENS
from tinsmithd.training.journal import Fenced, StoreDamaged, StoredSnapshot
from tinsmithd.training.lane import TakeTurn
from tinsmithd.training.models.model import Model
from tinsmithd.training.models.model_snapshots import ModelSnapshots
from tinsmithd.training.models.shared import Shared
from tinsmithd.training.models.snapshot_store import SnapshotDraft
from tinsmithd.training.ranks import RankGroupLost, StateInfo

_log = logging.getLogger(__name__)


class SnapshotTaker:
    """Takes the snapshots of one model.

    Args:
        model: Of which one.
        snapshots: Where they come to.
        shared: What all models share.
    """

    def __init__(self, model: Model, snapshots: ModelSnapshots, shared: Shared) -> None:
        self._model = model
        self._snapshots = snapshots
        self._place, self._counts = shared.place, shared.place.counts
        self._copies = shared.checkpoints.copies
        self._rule = shared.limits.calls.snapshots
        # 0 after a start, however old the newest snapshot is: the first step then takes one, so
        # that what has to be replayed now need not be replayed again.
        self._taken_step = model.step_count
        self._taken_s = 0.0
        self._taking: asyncio.Task[None] | None = None

    async def quiet(self) -> None:
        """Wait until no snapshot is on its way."""
        if self._taking is not None:
            await asyncio.wait([self._taking])

    def loaded(self, step_count: int) -> None:
        """The model loaded a checkpoint of so many steps, which is a snapshot now."""
        self._taken_step = step_count
        self._kept(None)

    def damaged(self, snapshot: StoredSnapshot) -> None:
        """A snapshot is damaged: the next one is due soon, and must not count on this one."""
        self._counts.snapshots_damaged += 1
        self._taken_step = snapshot.step_count - self._rule.steps

    async def stepped(self, position: int, turn: TakeTurn, *, full: bool) -> None:
        """After a step, which leaves no gradients: take a snapshot when one is due.

        Returns as soon as the ranks have copied the state.

        Args:
            position: That of the step.
            turn: Gives a turn.
            full: Whether one is due because the journal is filling up.
        """
        steps = self._model.step_count - self._taken_step
        now_s = asyncio.get_running_loop().time()
        self._taken_s = self._taken_s or now_s
        if self._snapshots.are_kept:
            self._counts.unkept_since_s.setdefault(self._model.model_id, time.monotonic())
        late = now_s - self._taken_s > self._rule.interval_s
        if not self._snapshots.are_kept or self._taking is not None or steps < 1:
            return
        if steps < self._rule.steps and not late and not full:
            return
        if await self._take(position, turn):
            self._taken_s = now_s

    async def resting(self, position: int, turn: TakeTurn) -> None:
        """The model is idle, or leaves the ranks: take a snapshot if it made steps since the last.

        Args:
            position: No later call changed more than the pending gradients.
            turn: Gives a turn.
        """
        newest = self._snapshots.newest
        newest_position = 0 if newest is None else newest.position
        changed = position > newest_position and self._model.step_count > self._taken_step
        if changed and self._taking is None:
            await self._take(position, turn)

    async def _take(self, position: int, turn: TakeTurn) -> bool:
        """Let the ranks copy the state, which is then written; False where they cannot."""
        model, group = self._model, self._place.current
        if group is None or not self._snapshots.are_kept:
            return False
        draft = self._snapshots.begin(position)
        await self._copies.leaving.acquire()
        try:
            deposit = await draft.deposit()
            async with turn(NOMINAL_TOKENS):
                sending = await group.copy_state(
                    model.model_id, optimizer=True, on_piece=draft.write, deposit=deposit
                )
        except BaseException as error:
            self._copies.leaving.release()
            await draft.discard()
            if not isinstance(error, TinsmithError | OSError):
                raise
            self._failed(error)
            return False
        self._taken_step = model.step_count
        taken_s = time.monotonic()
        self._taking = asyncio.create_task(self._write(position, draft, sending, taken_s))
        return True

    async def _write(
        self, position: int, draft: SnapshotDraft, sending: Awaitable[StateInfo], taken_s: float
    ) -> None:
        try:
            try:
                state = await sending
                if state.deposited:
                    draft.left(state.deposited)
            finally:
                self._copies.leaving.release()
            await self._snapshots.add(draft, position, state.step_count)
            self._counts.snapshots += 1
            self._kept(None if state.step_count == self._model.step_count else taken_s)
        except (TinsmithError, RankGroupLost, StoreDamaged, OSError, Fenced) as error:
            self._failed(error)
            await draft.discard()
        finally:
            self._taking = None

    def _failed(self, error: Exception) -> None:
        self._counts.snapshots_failed += 1
        _log.warning("no snapshot of model %s: %s", self._model.log_name, error)

    def _kept(self, since_s: float | None) -> None:
        """A snapshot has the model's steps up to then; None: all of them."""
        self._counts.unkept_since_s.pop(self._model.model_id, None)
        if since_s is not None:
            self._counts.unkept_since_s[self._model.model_id] = since_s

    def forget(self) -> None:
        """The model is deleted."""
        self._kept(None)
