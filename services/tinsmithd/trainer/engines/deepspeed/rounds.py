"""Computes the data of one call on this rank and the others, round by round (`plan`)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from tinsmithd import failpoints
from tinsmithd.domain import CrossEntropy, Datum, LossFn
from tinsmithd.errors import Reason, ResourceExhausted
from tinsmithd.modeling.full import FullWeights
from tinsmithd.modeling.lora import Adapters
from tinsmithd.trainer.compute.packed import PackedResult, compute_packed
from tinsmithd.trainer.engines import memory
from tinsmithd.trainer.engines import plan as plans
from tinsmithd.trainer.engines.deepspeed.residency import Model, Slot
from tinsmithd.trainer.engines.interface import OnResult
from tinsmithd.trainer.engines.plan import MicroBatch, Round

_AS_PLANNED, _SPLIT, _REFUSED = range(3)
"""How a round went on a rank; the ranks go by the largest."""


@dataclass(frozen=True)
class Place:
    """Where an engine computes.

    Attributes:
        weights: What is trained of the base.
        device: Of this rank.
        rank: This process's.
        world_size: Number of ranks.
        partitioned: Whether each rank holds a share of the base only.
    """

    weights: Adapters | FullWeights
    device: torch.device
    rank: int
    world_size: int
    partitioned: bool

    @property
    def in_step(self) -> bool:
        """Whether every rank must walk through the base as often as the others do."""
        return self.partitioned and self.world_size > 1


class Call:
    """One call to `forward`.

    Args:
        place: Where.
        model: Its model, whose waiting gradients are added to.
        slot: Where that is on the device.
        data: What to compute.
        loss_fn: Which loss.
        backward: Whether gradients are wanted.
        exactly: The rounds are to be executed as they are; else a micro-batch that does not fit
            into memory is split.

    Attributes:
        loss: This rank's share of the summed loss so far.
        executed: The rounds so far, as all ranks executed them.
    """

    def __init__(
        self,
        place: Place,
        model: Model,
        slot: Slot,
        data: Sequence[Datum],
        loss_fn: LossFn,
        *,
        backward: bool,
        exactly: bool,
    ) -> None:
        self._place = place
        self._model = model
        self._slot = slot
        self._data = data
        self._lengths = [len(datum.tokens) for datum in data]
        self._loss_fn = loss_fn
        self._backward = backward
        # Gradients that are added while they are made could be added twice.
        self._whole = exactly or slot.zero.adds_while_computing
        self._failpoint = "mid_backward" if backward else "mid_forward"
        self._computed_count = 0
        self.loss = 0.0
        self.executed: list[Round] = []

    def run(self, rounds: Sequence[Round], on_result: OnResult) -> None:
        """Compute and share everything.

        Raises:
            ResourceExhausted: On all ranks alike, where memory does not suffice on one.
        """
        in_order = _InOrder(on_result)
        for number, planned in enumerate(rounds, 1):
            results = self._compute_together(planned)
            if number == len(rounds) and self._computed_count == 1:
                failpoints.hit(self._failpoint)  # there was no place between two micro-batches
            self._share(planned, results, in_order)

    def _compute_together(self, planned: Round) -> dict[int, np.ndarray]:
        """This rank's part of a round, which fails on every rank where it fails on one.

        So they stay in step. What was split anywhere gets known everywhere.
        """
        results: dict[int, np.ndarray] = {}
        executed: list[MicroBatch] = []
        failure: ResourceExhausted | None = None
        try:
            self._take_part(planned, results, executed)
        except ResourceExhausted as error:
            failure = error
        how = _SPLIT if tuple(executed) != planned[self._place.rank] else _AS_PLANNED
        how = self._largest(_REFUSED if failure is not None else how)
        if how == _REFUSED:
            message = "a datum of this call does not fit into the memory of another rank"
            raise failure or ResourceExhausted(message, Reason.OUT_OF_MEMORY)
        self.executed.append(planned if how == _AS_PLANNED else self._exchange(planned, executed))
        return results

    def _largest(self, how: int) -> int:
        if self._place.world_size == 1:
            return how
        shared = torch.tensor([how], dtype=torch.int32, device=self._place.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return int(shared)

    def _exchange(self, planned: Round, executed: Sequence[MicroBatch]) -> Round:
        marks = plans.marks(planned, self._place.rank, executed)
        shared = torch.tensor(marks, dtype=torch.int32, device=self._place.device)
        dist.all_reduce(shared)
        return plans.from_marks(planned, shared.tolist())

    def _take_part(
        self, planned: Round, results: dict[int, np.ndarray], executed: list[MicroBatch]
    ) -> None:
        """This rank's part of a round: logprobs by index of the datum, and how they were made."""
        model, slot = self._model, self._slot

        def compute(indices: Sequence[int], recompute: bool) -> None:
            if self._computed_count:
                failpoints.hit(self._failpoint)
            result = self._packed([self._data[i] for i in indices], self._loss_fn, recompute)
            if result.gradients:
                model.waiting.add(result.gradients, slot.zero.layout, slot.zero.padded_count)
            self.loss += result.loss
            self._computed_count += 1
            results.update(zip(indices, result.logprobs, strict=True))
            executed.append(MicroBatch(tuple(indices), recompute))

        mine = planned[self._place.rank]
        if not mine and self._place.in_step:
            first = next(of_rank[0] for of_rank in planned if of_rank)
            nothing = _without_weight(self._data[first.indices[0]])
            self._packed([nothing], CrossEntropy(), first.recompute)
        for micro_batch in mine:
            indices, recompute = micro_batch.indices, micro_batch.recompute
            if self._place.in_step:
                compute(indices, recompute)  # running out of memory ends the group
            elif self._whole:
                memory.refuse_on_out_of_memory(compute, indices, recompute, self._lengths)
            else:
                memory.split_on_out_of_memory(compute, indices, recompute, self._lengths)

    def _packed(self, data: Sequence[Datum], loss_fn: LossFn, recompute: bool) -> PackedResult:
        weights, slot = self._place.weights, self._slot
        with (
            weights.active(slot.key) as causal_lm,
            slot.zero.collecting(self._model.waiting) as sink,
        ):
            return compute_packed(
                causal_lm,
                weights.head(slot.key),
                slot.parameters,
                data,
                loss_fn,
                self._place.device,
                backward=self._backward,
                recompute=recompute,
                sink=sink,
            )

    def _share(
        self, planned: Round, results: Mapping[int, np.ndarray], in_order: "_InOrder"
    ) -> None:
        """Give every rank the results of one round."""
        for owner, of_rank in enumerate(planned):
            indices = plans.indices_of(of_rank)
            if not indices:
                continue
            shapes = [self._data[index].loss_fn_inputs["target_tokens"].shape for index in indices]
            if self._place.world_size == 1:
                parts = [results[index] for index in indices]
            else:
                flat = np.empty(sum(map(math.prod, shapes)), np.float32)
                if owner == self._place.rank:
                    flat = np.concatenate([results[index].reshape(-1) for index in indices])
                shared = torch.from_numpy(flat).to(self._place.device)
                dist.broadcast(shared, src=owner)
                parts = np.split(
                    shared.cpu().numpy(), np.cumsum([math.prod(shape) for shape in shapes])[:-1]
                )
            for index, shape, part in zip(indices, shapes, parts, strict=True):
                in_order.take(index, part.reshape(shape))


class _InOrder:
    """Hands results on in the order of the data, as soon as that is possible."""

    def __init__(self, on_result: OnResult) -> None:
        self._on_result = on_result
        self._early: dict[int, np.ndarray] = {}
        self._next = 0

    def take(self, index: int, logprobs: np.ndarray) -> None:
        self._early[index] = logprobs
        while self._next in self._early:
            self._on_result(self._next, {"logprobs": self._early.pop(self._next)})
            self._next += 1


def _without_weight(datum: Datum) -> Datum:
    """A datum as long as another, of no effect."""
    targets = datum.loss_fn_inputs["target_tokens"]
    weights = np.zeros(targets.shape, np.float32)
    return Datum(datum.tokens, {"target_tokens": targets, "weights": weights})
