"""Computes the data of one batch on this rank and the others, round by round.

The device is given one micro-batch after the other, and nothing waits for it in between. A rank
that is alone hands results on as they arrive. Several share all of a batch at its end, in one
message of each: what it says, and how often, does not grow with the number of micro-batches.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tinsmithd import failpoints
from tinsmithd.domain import CrossEntropy, Datum, LossFn
from tinsmithd.errors import Reason, ResourceExhausted
from tinsmithd.modeling.device_copies import ToHost
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
        loss: This rank's share of the summed loss so far, a scalar in float64 on the device.
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
        self._shapes = [datum.loss_fn_inputs["target_tokens"].shape for datum in batch.data]
        # A second attempt would add again what the first added while it computed.
        self._whole = bool(batch.composition) or slot.zero.adds_while_computing
        self._failpoint = "mid_backward" if batch.backward else "mid_forward"
        self._computed_count = 0
        self._computed: list[tuple[Sequence[int], Tensor]] = []
        """Of this rank, not handed on yet: indices, and logprobs flat on the device."""
        self.loss = torch.zeros((), dtype=torch.float64, device=context.device)
        self.executed: list[Round] = []

    def run(self, composed: Sequence[Round], on_output: OnOutput) -> None:
        """Compute everything and share the outputs.

        Raises:
            ResourceExhausted: On all ranks alike, where memory does not suffice on one.
        """
        in_order = _InOrder(on_output)
        on_their_way: ToHost[Sequence[int]] = ToHost()
        for number, round_ in enumerate(composed, 1):
            self._compute_together(round_)
            if number == len(composed) and self._computed_count == 1:
                failpoints.hit(self._failpoint)  # a single micro-batch has no other place for it
            if self._context.world_size == 1:
                for indices, logprobs in self._computed:
                    on_their_way.put(indices, logprobs)
                self._computed.clear()
                self._hand_on(on_their_way.arrived(), in_order)
        if self._context.world_size > 1:
            self._share(composed, on_their_way)
        self._hand_on(on_their_way.rest(), in_order)

    def _compute_together(self, round_: Round) -> None:
        """Compute this rank's share of a round.

        A failure on one rank is raised on all of them, so that they stay in step, and every rank
        learns what another one split. Where ranks need each other while they compute, none splits
        anything, and running out of memory ends the group.
        """
        executed: list[MicroBatch] = []
        failure: ResourceExhausted | None = None
        if self._context.in_step or rounds.spread_over(round_) > 1:
            self._take_part(round_, executed)
            self.executed.append(round_)
            return
        try:
            self._take_part(round_, executed)
        except ResourceExhausted as error:
            failure = error
        how = _SPLIT if tuple(executed) != round_[self._context.rank] else _AS_COMPOSED
        how = self._largest(_REFUSED if failure is not None else how)
        if how == _REFUSED:
            message = "a datum of this call does not fit into the memory of another rank"
            raise failure or ResourceExhausted(message, Reason.OUT_OF_MEMORY)
        self.executed.append(round_ if how == _AS_COMPOSED else self._exchange(round_, executed))

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

    def _take_part(self, round_: Round, executed: list[MicroBatch]) -> None:
        """Compute this rank's micro-batches, and note them in `executed`."""
        batch, model, slot = self._batch, self._model, self._slot
        over = rounds.spread_over(round_)
        rank = self._context.rank
        first_of_group = rank - rank % over

        def compute(shares: bool, indices: Sequence[int], recompute: bool) -> None:
            if self._computed_count:
                failpoints.hit(self._failpoint)
            data = [batch.data[i] for i in indices]
            how = MicroBatch(tuple(indices), recompute, over, shares)
            result = self._packed(data, batch.loss_fn, how)
            if result.gradients:
                model.pending.add(result.gradients, slot.zero.layout, slot.zero.padded_count)
            self.loss += result.loss
            self._computed_count += 1
            progress.made()
            if rank == first_of_group:  # the others took part
                self._computed.append((indices, result.logprobs))
                executed.append(how)

        mine = round_[first_of_group]
        if not mine and self._context.in_step:
            first = next(of_rank[0] for of_rank in round_ if of_rank)
            nothing = _without_weight(batch.data[first.indices[0]])
            self._packed([nothing], CrossEntropy(), first)
        for micro_batch in mine:
            some, recompute = micro_batch.indices, micro_batch.recompute
            run = partial(compute, micro_batch.shares)
            if self._context.in_step or over > 1:
                run(some, recompute)  # running out of memory ends the group
            else:
                memory.compute_within_memory(
                    *(run, some, recompute, self._lengths), together=self._whole
                )

    def _packed(self, data: Sequence[Datum], loss_fn: LossFn, how: MicroBatch) -> PackedResult:
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
                recompute=how.recompute,
                sink=sink,
                spread=self._context.spread(tokens, how.ranks),
                shares=how.shares,
            )

    def _share(self, composed: Sequence[Round], to: ToHost[Sequence[int]]) -> None:
        """Give every rank the logprobs of all data, and then to `to`.

        A rank's data come in the order in which they were composed, however they were split.
        """
        owned = [
            [index for round_ in composed for index in rounds.indices_of(round_[rank])]
            for rank in range(self._context.world_size)
        ]
        counts = [sum(math.prod(self._shapes[index]) for index in of_rank) for of_rank in owned]
        own = torch.zeros(max(counts), device=self._context.device)
        if self._computed:
            parts = [logprobs for _, logprobs in self._computed]
            torch.cat(parts, out=own[: counts[self._context.rank]])
        of_all = own.new_empty(len(counts) * len(own))
        dist.all_gather_into_tensor(of_all, own)
        for of_rank, count, indices in zip(of_all.split(len(own)), counts, owned, strict=True):
            if indices:
                to.put(indices, of_rank[:count])

    def _hand_on(
        self, arrived: Iterator[tuple[Sequence[int], np.ndarray]], in_order: "_InOrder"
    ) -> None:
        for indices, flat in arrived:
            progress.made()
            ends = np.cumsum([math.prod(self._shapes[index]) for index in indices])
            for index, piece in zip(indices, np.split(flat, ends[:-1]), strict=True):
                in_order.take(index, piece.reshape(self._shapes[index]))


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
