"""Brings a model back to the ranks, bit for bit.

A model comes back from the newest snapshot that verifies, and from the calls after it, which are
replayed as they were made first: same data, same composition, same order. What each gives is held
against what it gave then.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

from tinsmithd import failpoints
from tinsmithd.errors import Reason, Unavailable
from tinsmithd.training.call import (
    NOMINAL_TOKENS,
    Composition,
    ComputeWork,
    StepWork,
    StoredAnswer,
    answer_digest,
    are_close,
    differing_keys,
    model_lost,
    repeats_bits,
)
from tinsmithd.training.journal import StoreDamaged, StoredCall
from tinsmithd.training.lane import Effect, TakeTurn
from tinsmithd.training.models.model import Model
from tinsmithd.training.models.model_snapshots import ModelSnapshots
from tinsmithd.training.models.shared import Shared
from tinsmithd.training.models.snapshot_store import Snapshot
from tinsmithd.training.models.snapshot_taker import SnapshotTaker
from tinsmithd.training.ranks import OnOutput, RankGroup, RankGroupLost

BASE_KEYS = ("base_model", "dtype")
"""Of an identity: a model without calls to replay needs these alone to be the same."""
CLOSE_KEYS = (*BASE_KEYS, "engine", "world_size", "zero_stage")
"""Where a replay need only come close, calls to replay need these to be the same."""
PAUSE_S_MAX = 60.0
"""A model during whose return ranks die again and again lets others go first for so long."""

_log = logging.getLogger(__name__)


class Replay(Protocol):
    """Makes a call on the ranks once more."""

    async def __call__(
        self,
        group: RankGroup,
        call: str,
        work: ComputeWork | StepWork,
        composition: Composition,
        on_output: OnOutput,
        turn: TakeTurn,
    ) -> Effect:
        """Compute, or step, in a given composition."""


class Stepped(Protocol):
    """Hears from where on there are no pending gradients."""

    def __call__(self, position: int) -> None:
        """No gradients are pending after this position."""


class Recovery:
    """Brings one model back.

    Args:
        model: Which one.
        snapshots: Its snapshots.
        taker: Takes them; quiet while the model is brought back.
        shared: What all models share.
        replay: Makes a call once more.
        stepped: Told of each position after which no gradients are pending.
    """

    def __init__(
        self,
        model: Model,
        snapshots: ModelSnapshots,
        taker: SnapshotTaker,
        shared: Shared,
        *,
        replay: Replay,
        stepped: Stepped,
    ) -> None:
        self._model = model
        self._snapshots = snapshots
        self._taker = taker
        self._place = shared.place
        self._journal = shared.journal
        self._copies = shared.checkpoints.copies
        self._exact = shared.limits.calls.exact_replay
        self._make_again = replay
        self._stepped = stepped
        self._failures = 0
        self._said: Sequence[str] = ()

    async def restore(self, turn: TakeTurn) -> None:
        """Wait for ranks and bring the model to the state after the last recorded call."""
        self._model.doing("waits for the ranks")
        if self._failures > 1:
            await asyncio.sleep(min(2.0**self._failures, PAUSE_S_MAX))
        group = await self._place.wait()
        try:
            await self._journal.flush()
            await self._restore(group, turn)
        except RankGroupLost as error:
            self._failures += error.blamed
            raise
        self._failures = 0
        self._model.doing("")

    async def _restore(self, group: RankGroup, turn: TakeTurn) -> None:
        model = self._model
        # What it finds must not be trimmed meanwhile.
        await self._taker.quiet()
        try:
            stored = await self._journal.calls(model.model_id)
        except StoreDamaged as error:
            raise model_lost(model.model_id, str(error)) from error
        async with self._copies.coming:
            begin, snapshot = await self._newest()
            calls = [
                (call, Composition.decode(call.composition))
                for call in stored
                if call.position > begin and call.composition
            ]
            self._check_fits(group, [composition for _, composition in calls])
            model.doing(f"is brought back, {len(calls)} calls after its snapshot")
            async with turn(NOMINAL_TOKENS):
                await self._put(group, snapshot)
            snapshot_step = 0 if snapshot is None else snapshot.step_count
            del snapshot
        model.set_state(snapshot_step)
        self._stepped(begin)
        for index, (call, composition) in enumerate(calls):
            model.doing(f"is brought back, call {index + 1} of {len(calls)}")
            await self._replay(group, call, composition, turn)
            failpoints.hit("restore_mid")
        _log.info(
            "model %s is back at step %d: snapshot of step %d and %d calls",
            *(model.log_name, model.step_count, snapshot_step, len(calls)),
        )

    async def _put(self, group: RankGroup, snapshot: Snapshot | None) -> None:
        """Put a state onto the ranks in place of whatever they have of the model."""
        model = self._model
        await group.delete_model(model.model_id)
        if snapshot is None:
            await group.create_model(model.model_id, model.tuning)
            return
        await group.import_state(
            model.model_id,
            snapshot.pieces,
            optimizer=snapshot.optimizer,
            create=True,
            said=None,
        )

    async def _newest(self) -> tuple[int, Snapshot | None]:
        """The newest snapshot that verifies, with its position; None for the model's beginning."""
        model = self._model
        for found in self._snapshots.newest_first:
            try:
                return found.position, await self._snapshots.read(found)
            except StoreDamaged as error:
                _log.error("model %s: %s", model.log_name, error)
                self._snapshots.strike_out(found)
                self._taker.damaged(found)
        if model.from_checkpoint or self._snapshots.trimmed:
            raise model_lost(model.model_id, "no snapshot of it is whole")
        return 0, None

    # --- do these ranks give the same? --------------------------------------------------------

    def _check_fits(self, group: RankGroup, compositions: Sequence[Composition]) -> None:
        identity = group.identity
        pairs: list[tuple[Mapping[str, str], Sequence[str]]] = [(self._model.identity, BASE_KEYS)]
        pairs += [
            (composition.identity, () if self._is_exact(group, composition) else CLOSE_KEYS)
            for composition in compositions
        ]
        for ours, compared in pairs:
            differing = differing_keys(ours, identity, compared)
            if differing:
                raise self._mismatch(differing, ours, identity)

    def _mismatch(
        self, keys: Sequence[str], ours: Mapping[str, str], theirs: Mapping[str, str]
    ) -> Unavailable:
        """The ranks are of another kind. Callers hear which settings differ, and the log how."""
        differ = f"{', '.join(keys)} {'differs' if len(keys) == 1 else 'differ'}"
        message = f"model {self._model.public_id} cannot go on with these ranks: {differ}"
        was = [
            f"{key} was {ours.get(key, 'unset')} and is {theirs.get(key, 'unset')}" for key in keys
        ]
        if was != self._said:  # it is tried again and again
            _log.error("model %s: %s", self._model.log_name, "; ".join(was))
            self._said = was
        self._model.doing(message)
        error = Unavailable(message, Reason.RANK_GROUP_MISMATCH, retry_after_s=5.0)
        error.logged = differ
        return error

    def _is_exact(self, group: RankGroup, composition: Composition) -> bool:
        """Whether a call must give the same bits: only where it could when it was made first."""
        both = (group.identity, composition.identity)
        return self._exact and all(repeats_bits(identity) for identity in both)

    async def _replay(
        self, group: RankGroup, call: StoredCall, composition: Composition, turn: TakeTurn
    ) -> None:
        model = self._model
        try:
            work = await self._journal.work(model.model_id, call.position)
        except StoreDamaged as error:
            raise model_lost(model.model_id, str(error)) from error
        if not isinstance(work, ComputeWork | StepWork):
            raise TypeError(f"call {call.position} changes nothing on the ranks: {work.kind}")
        outputs: list[bytes] = []
        name = f"seq_id {call.seq_id}" if call.seq_id else f"call {call.position}"
        effect = await self._make_again(group, name, work, composition, outputs.append, turn)
        answer = StoredAnswer(outputs, effect.value)
        if effect.error is not None:
            answer = StoredAnswer(error=effect.error)
        same = answer_digest(answer) == call.answer_digest
        if not same and not self._is_exact(group, composition):
            tokens = sum(work.lengths) if isinstance(work, ComputeWork) else 0
            same = are_close(composition.metrics, effect.value.get("metrics", {}), tokens)
        if not same:
            why = f"{name} gave another result than it gave before"
            raise model_lost(model.model_id, why)
        if isinstance(work, StepWork):
            self._stepped(call.position)
