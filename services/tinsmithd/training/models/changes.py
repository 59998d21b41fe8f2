"""Calls that change a model on the ranks: computing, and optimizer steps."""

from tinsmithd.errors import FailedPrecondition, Reason
from tinsmithd.training.call import (
    NOMINAL_TOKENS,
    Composition,
    ComputeWork,
    StepWork,
    add_metrics,
    batch_sizes,
    batches_of,
)
from tinsmithd.training.lane import Effect, TakeTurn
from tinsmithd.training.models.model import Model
from tinsmithd.training.ranks import Counts, OnOutput, RankGroup, WorkKind


class Changes:
    """Makes the calls of one model, for the first time or, in a given composition, again.

    Args:
        model: Which one.
        counts: Told what the ranks computed.
        quantum_tokens: Maximum tokens of a batch that has more than one datum, on one rank.

    Attributes:
        has_gradients: Whether the model has pending gradients.
        stepped_at: Position after which none were pending, the newest.
        pending: Sums over the calls that added them, by the name of a metric.
    """

    def __init__(self, model: Model, counts: Counts, quantum_tokens: int) -> None:
        self._model = model
        self._counts = counts
        self._quantum_tokens = quantum_tokens
        self.has_gradients = False
        self.stepped_at = 0
        self.pending: dict[str, float] = {}

    def stepped(self, position: int) -> None:
        """No gradients are pending after this position."""
        self.stepped_at, self.has_gradients, self.pending = position, False, {}

    async def make(
        self,
        group: RankGroup,
        call: str,
        work: ComputeWork | StepWork,
        composition: Composition | None,
        on_output: OnOutput,
        turn: TakeTurn,
    ) -> Effect:
        """Compute, or step; in a given composition it gives the same again.

        Args:
            group: The ranks.
            call: What errors call this call.
            work: What it asks for.
            composition: That of the first time; None where this is the first time.
            on_output: Takes its outputs.
            turn: Gives a turn.
        """
        if isinstance(work, ComputeWork):
            return await self._compute(group, call, work, composition, on_output, turn)
        effect = await self._step(group, work, turn)
        self._counts.steps += composition is None and effect.error is None
        return effect

    async def _compute(
        self,
        group: RankGroup,
        call: str,
        work: ComputeWork,
        composition: Composition | None,
        on_output: OnOutput,
        turn: TakeTurn,
    ) -> Effect:
        if composition is not None:
            kind, sizes = WorkKind.REPLAY, composition.batch_sizes
        else:
            kind = WorkKind.FORWARD_BACKWARD if work.backward else WorkKind.FORWARD
            sizes = batch_sizes(work.lengths, self._quantum_tokens, group.world_size)
        metrics: dict[str, float] = {}
        made: list[bytes] = []
        engine_s = 0.0
        for index, (place, batch) in enumerate(batches_of(work, sizes)):
            given = composition.batches[index] if composition else b""
            tokens = sum(batch.lengths)
            async with turn(tokens):
                computed = await group.compute(
                    self._model.model_id,
                    batch,
                    place=place,
                    composition=given,
                    on_output=on_output,
                )
            add_metrics(metrics, computed.metrics)
            made.append(computed.composition)
            engine_s += computed.engine_s
            flops = group.work.flops(
                batch.lengths, backward=work.backward, frozen=self._model.tuning.is_adapter
            )
            self._counts.computed(
                *(kind, tokens, computed.engine_s, computed.mismatch),
                flops=flops,
                owner=self._model.owner,
            )
            if work.backward and computed.non_finite:
                self._model.became_non_finite(call)
        if not work.backward:  # it changed nothing: there is nothing to make again
            return Effect({"metrics": metrics}, engine_s=engine_s)
        self.has_gradients = True
        self._add_pending(work, metrics["loss:sum"])
        whole = Composition(group.identity, sizes, made, metrics)
        return Effect({"metrics": metrics}, composition=whole.encode(), engine_s=engine_s)

    def _add_pending(self, work: ComputeWork, loss: float) -> None:
        sums = {
            "loss:sum": loss,
            "data:sum": len(work.lengths),
            "tokens:sum": sum(work.lengths),
            "calls:sum": 1,
        }
        for name, value in sums.items():
            self.pending[name] = self.pending.get(name, 0.0) + value

    async def _step(self, group: RankGroup, work: StepWork, turn: TakeTurn) -> Effect:
        model = self._model
        try:
            async with turn(NOMINAL_TOKENS):
                metrics = await group.optim_step(model.model_id, work.adam)
        except FailedPrecondition as error:
            if error.reason is not Reason.NON_FINITE_GRADIENT:
                raise
            since = model.non_finite_since
            model.set_state(model.step_count)  # the ranks cleared the gradients
            if since:
                error.message += f"; they became so with {since}"
                error.metadata["since"] = since
            return Effect(error=error, composition=Composition(group.identity).encode())
        model.stepped()
        whole = Composition(group.identity, metrics=metrics)
        return Effect({"metrics": dict(metrics)}, composition=whole.encode())
