"""What must be true: each model as if its calls had been applied once, in order, undisturbed."""

from typing import TYPE_CHECKING

from sim import engine
from sim.checkpoints import digest_of, training
from sim.clients import ModelUser
from sim.engine import State
from tinsmithd.domain import CheckpointPath
from tinsmithd.errors import Reason
from tinsmithd.training.call import (
    ComputeWork,
    LoadWork,
    SaveWork,
    StepWork,
    StoredAnswer,
    Work,
    decode_answer,
)

if TYPE_CHECKING:
    from sim.world import World

Files = tuple[tuple[str, bytes], ...]

Made = tuple[str, Files]
"""A checkpoint: the id of the call that saved it, and its files."""


class Wrong(Exception):
    """An answer is not what it must be."""


class Oracle:
    """One model.

    Attributes:
        state: After the calls so far.
        user: Who calls.
        ended: It was deleted or lost: nothing more is known.
        steps: Number of each call that made a step, and what the step has to remember.
    """

    def __init__(self, world: "World", user: ModelUser) -> None:
        self._world = world
        self.user = user
        self._saved: dict[str, set[Made | None]] = {}
        self.ended = False
        self.steps: list[tuple[int, int, int]] = []
        self._computed = 0
        assert user.new is not None
        if user.new.path is None:
            assert user.new.tuning is not None
            self.state = engine.fresh(getattr(user.new.tuning, "seed", 0))
        else:
            pieces = world.checkpoints.saved[str(user.new.path)].pieces
            self.state = engine.load(pieces, user.new.with_optimizer)

    def check(self) -> None:
        """Apply all calls and hold their answers against what they must be.

        Raises:
            Wrong: One is not.
        """
        for seq_id, call in sorted(self.user.calls.items()):
            found = self.user.answers.get(seq_id)
            if found is None:
                raise Wrong(f"call {seq_id} has no answer")
            answer = decode_answer(found)
            reason = None if answer.error is None else answer.error.reason
            if reason is Reason.MODEL_NOT_FOUND and self.user.deleting:
                self._ends_at(seq_id)
                return
            if reason is Reason.MODEL_LOST and self._world.may_be_lost(self.user.model_id):
                self.ended = True
                return
            try:
                self._apply(seq_id, call.work, answer, reason)
            except Wrong as error:
                raise Wrong(
                    f"{self.user.name} ({self.user.model_id}) call {seq_id} {call.work}: "
                    f"{error}; answer {found!r}; state {engine.show(self.state)}"
                ) from None
            self._world.checked("answer")

    def _ends_at(self, seq_id: int) -> None:
        """The model was deleted before this call, or after it but before anybody had its answer."""
        self.ended = True
        for later, call in self.user.calls.items():
            if later >= seq_id and isinstance(call.work, SaveWork):
                self._saved.pop(str(call.work.options.path), None)

    def _apply(
        self, seq_id: int, work: Work | None, answer: StoredAnswer, reason: Reason | None
    ) -> None:
        if reason is Reason.CALL_POISONED:
            self._check_poisoned(seq_id, work)
            return
        match work:
            case None:
                _expect(reason, Reason.INVALID_FIELD)
            case ComputeWork():
                self._compute(work, answer, reason)
            case StepWork():
                if self._step(work, answer, reason):
                    self.steps.append((seq_id, self.state.step_count, self._computed))
                self._computed = 0
            case SaveWork():
                self._save(work, answer, reason)
            case LoadWork():
                self._load(work, answer, reason)

    def _check_poisoned(self, seq_id: int, work: Work | None) -> None:
        key = str(seq_id)
        if isinstance(work, SaveWork):
            key = "snapshot"
            # Its first try may have gone through, and nobody knew.
            path = str(work.options.path)
            self._saved.setdefault(path, {None}).add(self._made(work))
        elif isinstance(work, LoadWork):
            key = "import"
        deaths = self._world.blames.get(f"{self.user.model_id} {key}", 0)
        if isinstance(work, LoadWork):  # or of others that took in the same checkpoint
            deaths = sum(n for what, n in self._world.blames.items() if what.endswith(" import"))
        if deaths < self._world.limits.lane.call_attempts_max:
            raise Wrong(f"poisoned after {deaths} deaths")
        self._world.checked("poisoned")

    def _compute(self, work: ComputeWork, answer: StoredAnswer, reason: Reason | None) -> None:
        for datum in work.data:
            if datum[:1] == engine.REFUSED:
                _expect(reason, Reason.INVALID_FIELD)
                return
            if datum[:1] == engine.POISON:
                raise Wrong("a poison call went through")
        _expect(reason, None)
        if len(answer.outputs) != len(work.data):
            raise Wrong(f"{len(answer.outputs)} outputs for {len(work.data)} data")
        before = self.state
        for datum, result in zip(work.data, answer.outputs, strict=True):
            wanted = engine.output(before, work.loss, datum, engine.composition_of(result))
            if result != wanted:
                raise Wrong(f"result {result!r}, expected {wanted!r}")
            if work.backward:
                self.state = engine.add_gradient(self.state, datum, result)
        self._computed += work.backward
        wanted_metrics = engine.compute_metrics(self.state, answer.outputs)
        _expect(dict(answer.value), {"metrics": wanted_metrics})

    def _step(self, work: StepWork, answer: StoredAnswer, reason: Reason | None) -> bool:
        if self.state.non_finite:
            _expect(reason, Reason.NON_FINITE_GRADIENT)
            self.state = engine.cleared(self.state)
            return False
        _expect(reason, None)
        self.state, metrics = engine.step(self.state, work.adam)
        _expect(dict(answer.value), {"metrics": metrics})
        return True

    def _files(self, work: SaveWork) -> Files:
        return tuple(engine.files(self.state, training(work.options.path)))

    def _made(self, work: SaveWork) -> Made:
        return work.options.request_id, self._files(work)

    def _save(self, work: SaveWork, answer: StoredAnswer, reason: Reason | None) -> None:
        path, made = str(work.options.path), self._made(work)
        there = self._saved.setdefault(path, {None})
        if reason is Reason.CHECKPOINT_EXISTS:
            there -= {None, made}
            if not there or work.options.overwrite:
                raise Wrong("there is none of another call")
            return
        _expect(reason, None)
        if not work.options.overwrite and not there & {None, made}:
            raise Wrong("there is one of another call")
        self._saved[path] = {made}
        size = sum(len(data) for _, data in made[1])
        wanted = {"path": path, "size_bytes": size, "digest": digest_of(made[1]).hex()}
        _expect(dict(answer.value), wanted)

    def _load(self, work: LoadWork, answer: StoredAnswer, reason: Reason | None) -> None:
        path = str(work.path)
        if not training(work.path):
            _expect(reason, Reason.WRONG_CHECKPOINT_KIND)
            return
        there = self._saved.setdefault(path, {None})
        if reason is Reason.CHECKPOINT_NOT_FOUND:
            if None not in there:
                raise Wrong("there is one")
            there &= {None}
            return
        _expect(reason, None)
        whole = [made for made in there if made is not None]
        if len(whole) != 1:
            raise Wrong(f"{len(whole)} checkpoints may be there")
        self._saved[path] = {whole[0]}
        self.state, self._computed = engine.load(whole[0][1], work.optimizer), 0
        _expect(dict(answer.value), {"path": path})

    def check_saved(self) -> None:
        """Hold what the Checkpoint server has against what was saved."""
        for text, there in self._saved.items():
            found = self._world.checkpoints.saved.get(text)
            made = (found.request_id, found.pieces) if found is not None else None
            if made not in there:
                raise Wrong(f"{text} holds {made}, expected one of {there}")
            assert CheckpointPath.parse(text)
            self._world.checked("checkpoint")


def _expect(found: object, wanted: object) -> None:
    if found != wanted:
        raise Wrong(f"{found!r}, expected {wanted!r}")


def check_state(oracle: Oracle, found: State | None) -> None:
    """Hold a model on the ranks against what it must be."""
    if found != oracle.state:
        raise Wrong(f"the ranks have {found}, expected {oracle.state}")
