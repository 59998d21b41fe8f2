"""Computes the data of one batch on this rank and the others, round by round."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from tinsmithd import failpoints
from tinsmithd.domain import CrossEntropy, Datum, LossFn
from tinsmithd.errors import Reason, ResourceExhausted
from tinsmithd.trainer import progress
from tinsmithd.trainer.composition import rounds
from tinsmithd.trainer.composition.rounds import MicroBatch, Round
from tinsmithd.trainer.compute import memory
from tinsmithd.trainer.compute.packed import PackedResult, compute_packed
from tinsmithd.trainer.engines.deepspeed.residency import RankContext, ResidentModel, Slot
from tinsmithd.trainer.engines.interface import Batch, OnOutput

_AS_COMPOSED, _SPLIT, _REFUSED = range(3)
"""How a round went on a rank; the largest of the ranks' counts."""


class BatchRun:
    """One batch on its way.

    A run follows a composition that the batch brings. In one that the engine chose it splits a
    micro-batch that does not fit into memory.

    Args:
        context: Where it computes.
        model: The batch's model; gradients are added to its pending ones.
        slot: The model's place on the device.
        batch: The batch.

    Attributes:
        loss: This rank's share of the summed loss so far.
        executed: The rounds so far, as all ranks executed them.
    """

    def __init__(
        self, context: RankContext, model: ResidentModel, slot: Slot, batch: Batch
    ) -> None:
        self._context = context
        self._model = model
        self._slot = slot
        self._batch = batch
        self._lengths = [len(datum.tokens) for datum in batch.data]
        # A second attempt would add again what the first added while it computed.
        self._whole = bool(batch.composition) or slot.zero.adds_while_computing
        self._failpoint = "mid_backward" if batch.backward else "mid_forward"
        self._computed_count = 0
        self.loss = 0.0
        self.executed: list[Round] = []

    def run(self, composed: Sequence[Round], on_output: OnOutput) -> None:
        """Compute everything and share the outputs.

        Raises:
            ResourceExhausted: On all ranks alike, where memory does not suffice on one.
        """
        in_order = _InOrder(on_output)
        for number, round_ in enumerate(composed, 1):
            logprobs = self._compute_together(round_)
            if number == len(composed) and self._computed_count == 1:
                failpoints.hit(self._failpoint)  # a single micro-batch has no other place for it
            self._share(round_, logprobs, in_order)

    def _compute_together(self, round_: Round) -> dict[int, np.ndarray]:
        """Compute this rank's share of a round.

        A failure on one rank is raised on all of them, so that they stay in step, and every rank
        learns what another one split.

        Returns:
            Logprobs by index of the datum.
        """
        logprobs: dict[int, np.ndarray] = {}
        executed: list[MicroBatch] = []
        failure: ResourceExhausted | None = None
        try:
            self._take_part(round_, logprobs, executed)
        except ResourceExhausted as error:
            failure = error
        how = _SPLIT if tuple(executed) != round_[self._context.rank] else _AS_COMPOSED
        how = self._largest(_REFUSED if failure is not None else how)
        if how == _REFUSED:
            message = "a datum of this call does not fit into the memory of another rank"
            raise failure or ResourceExhausted(message, Reason.OUT_OF_MEMORY)
        self.executed.append(round_ if how == _AS_COMPOSED else self._exchange(round_, executed))
        return logprobs

    def _largest(self, how: int) -> int:
        if self._context.world_size == 1:
            return how
        shared = torch.tensor([how], dtype=torch.int32, device=self._context.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return int(shared)

    def _exchange(self, round_: Round, executed: Sequence[MicroBatch]) -> Round:
        marks = rounds.marks(round_, self._context.rank, executed)
        shared = torch.tensor(marks, dtype=torch.int32, device=self._context.device)
        dist.all_reduce(shared)
        return rounds.from_marks(round_, shared.tolist())

    def _take_part(
        self, round_: Round, logprobs: dict[int, np.ndarray], executed: list[MicroBatch]
    ) -> None:
        """Compute this rank's micro-batches into `logprobs`, and note them in `executed`."""
        batch, model, slot = self._batch, self._model, self._slot
        over = rounds.spread_over(round_)
        rank = self._context.rank
        first_of_group = rank - rank % over

        def compute(indices: Sequence[int], recompute: bool) -> None:
            if self._computed_count:
                failpoints.hit(self._failpoint)
            data = [batch.data[i] for i in indices]
            result = self._packed(data, batch.loss_fn, recompute, over)
            if result.gradients:
                model.pending.add(result.gradients, slot.zero.layout, slot.zero.padded_count)
            self.loss += result.loss
            self._computed_count += 1
            progress.made()
            if rank == first_of_group:  # the others took part
                logprobs.update(zip(indices, result.logprobs, strict=True))
                executed.append(MicroBatch(tuple(indices), recompute, over))

        mine = round_[first_of_group]
        if not mine and self._context.in_step:
            first = next(of_rank[0] for of_rank in round_ if of_rank)
            nothing = _without_weight(batch.data[first.indices[0]])
            self._packed([nothing], CrossEntropy(), first.recompute, over)
        for micro_batch in mine:
            indices, recompute = micro_batch.indices, micro_batch.recompute
            if self._context.in_step or over > 1:
                compute(indices, recompute)  # running out of memory ends the group
            else:
                memory.compute_within_memory(
                    *(compute, indices, recompute, self._lengths), together=self._whole
                )

    def _packed(
        self, data: Sequence[Datum], loss_fn: LossFn, recompute: bool, over: int
    ) -> PackedResult:
        weights, slot = self._context.weights, self._slot
        tokens = sum(len(datum.tokens) for datum in data)
        with (
            weights.active(slot.key) as causal_lm,
            slot.zero.collecting(self._model.pending) as sink,
        ):
            return compute_packed(
                causal_lm,
                weights.head(slot.key),
                slot.parameters,
                data,
                loss_fn,
                self._context.device,
                backward=self._batch.backward,
                recompute=recompute,
                sink=sink,
                spread=self._context.spread(tokens, over),
            )

    def _share(
        self, round_: Round, logprobs: Mapping[int, np.ndarray], in_order: "_InOrder"
    ) -> None:
        """Give every rank the logprobs of one round, and their outputs to `in_order`."""
        data = self._batch.data
        for owner, of_rank in enumerate(round_):
            indices = rounds.indices_of(of_rank)
            if not indices:
                continue
            shapes = [data[index].loss_fn_inputs["target_tokens"].shape for index in indices]
            if self._context.world_size == 1:
                pieces = [logprobs[index] for index in indices]
            else:
                flat = np.empty(sum(map(math.prod, shapes)), np.float32)
                if owner == self._context.rank:
                    flat = np.concatenate([logprobs[index].reshape(-1) for index in indices])
                shared = torch.from_numpy(flat).to(self._context.device)
                dist.broadcast(shared, src=owner)
                pieces = np.split(
                    shared.cpu().numpy(), np.cumsum([math.prod(shape) for shape in shapes])[:-1]
                )
            for index, shape, piece in zip(indices, shapes, pieces, strict=True):
                in_order.take(index, piece.reshape(shape))


class _InOrder:
    """Hands outputs on in the order of the data, as soon as that is possible."""

    def __init__(self, on_output: OnOutput) -> None:
        self._on_output = on_output
        self._early: dict[int, np.ndarray] = {}
        self._next = 0

    def take(self, index: int, logprobs: np.ndarray) -> None:
        self._early[index] = logprobs
        while self._next in self._early:
            self._on_output(self._next, {"logprobs": self._early.pop(self._next)})
            self._next += 1


def _without_weight(datum: Datum) -> Datum:
    """A datum of the same length whose loss is 0."""
    targets = datum.loss_fn_inputs["target_tokens"]
    weights = np.zeros(targets.shape, np.float32)
    return Datum(datum.tokens, {"target_tokens": targets, "weights": weights})
