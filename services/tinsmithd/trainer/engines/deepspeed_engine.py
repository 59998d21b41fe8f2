"""The DeepSpeed engine: one rank or many, ZeRO stages 0 to 3.

Data are cut into micro-batches by tokens, each computed in one forward without padding, and dealt
out to the ranks; gradients wait in a buffer on each rank. A step sums them over the ranks, once,
and hands each rank's slice to a DeepSpeed engine that holds this one adapter (`zero_adapter`).
With stage 3 the frozen base is partitioned over the ranks too, before PEFT wraps it.
"""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tinsmithd.domain import (
    AdamParams,
    BaseModelInfo,
    CrossEntropy,
    Datum,
    LossFn,
    ModelState,
    Tuning,
)
from tinsmithd.errors import InvalidArgument, Reason, ResourceExhausted
from tinsmithd.modeling.base import BaseModel
from tinsmithd.modeling.full import FullWeights
from tinsmithd.modeling.lora import Adapters, adapts_experts
from tinsmithd.modeling.packing import use_packed_attention
from tinsmithd.trainer.engines import batching, distributed, memory
from tinsmithd.trainer.engines.interface import ModelBroken, OnResult
from tinsmithd.trainer.engines.packed import PackedResult, compute_packed
from tinsmithd.trainer.engines.reference import check_state, non_finite_gradient
from tinsmithd.trainer.engines.residency import Model, ResidentModels, Slot
from tinsmithd.trainer.engines.zero_adapter import ZeroConfig
from tinsmithd.trainer.engines.zero_base import partition

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


class DeepSpeedEngine:
    """See `TrainingEngine`.

    Args:
        base: The base model; it is changed in place.
        zero: How models are spread over the ranks.
        micro_batch_tokens_max: Tokens that a rank computes together; a longer datum goes alone.
        resident_models_max: Models on the device at once; others wait in host memory.
        activation_bytes_max: What a rank may keep for the way back before it recomputes layers
            instead; 0 takes half of what is free now.
        full: One model trains all weights of the base, instead of many adapters.
    """

    def __init__(
        self,
        base: BaseModel,
        *,
        zero: ZeroConfig,
        micro_batch_tokens_max: int,
        resident_models_max: int,
        activation_bytes_max: int,
        full: bool = False,
    ) -> None:
        self._device = distributed.init()
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._partitioned = zero.stage == 3
        self._micro_batch_tokens_max = micro_batch_tokens_max
        self._base = base
        use_packed_attention(base.model)
        # What is trained does get stale, so no gathered copy of it may be kept.
        if full:
            zero = replace(zero, gathered_bytes_max=0)
        self._partition = partition(base.model, zero) if self._partitioned else None
        self._weights = FullWeights(base) if full else Adapters(base, fused=True)
        self._models = ResidentModels(
            self._weights,
            zero,
            device=self._device,
            resident_models_max=resident_models_max,
            release=self._release,
        )
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        bytes_max = memory.activation_bytes_max(activation_bytes_max, self._device, ranks_here)
        self._activation_bytes_max = _smallest(bytes_max, self._device)
        self._bytes_per_token: dict[Tuning, int] = {}

    @property
    def info(self) -> BaseModelInfo:
        """The base model that this engine holds."""
        return self._base.info

    def create_model(self, model_id: str, tuning: Tuning) -> None:
        """Add a model with its first values and no optimizer state.

        Raises:
            InvalidArgument: An adapter would stand on experts of a partitioned base.
        """
        if self._partitioned and adapts_experts(self._base, tuning):
            message = "experts cannot be adapted under ZeRO stage 3; set it to false"
            raise InvalidArgument("lora_config.train_mlp", message)
        self._models.add(model_id, tuning)

    def delete_model(self, model_id: str) -> None:
        """Drop a model; an unknown id is no error."""
        self._models.remove(model_id)

    def _release(self) -> None:
        """Let every rank hold no more of a partitioned base than its share."""
        if self._partition is not None:
            self._partition.optimizer.partition_all_parameters()

    def close(self) -> None:
        """Free what DeepSpeed holds; the engine is not used any more."""
        self._models.close()
        if self._partition is not None:
            self._partition.destroy()

    # --- forward and backward -----------------------------------------------------------------

    def forward(
        self,
        model_id: str,
        data: Sequence[Datum],
        loss_fn: LossFn,
        *,
        backward: bool,
        on_result: OnResult,
    ) -> Mapping[str, float]:
        """Compute the summed loss and, with `backward`, add its gradients to those waiting."""
        model, slot = self._models.use(model_id)
        lengths = [len(datum.tokens) for datum in data]
        plain_tokens_max = self._plain_tokens_max(slot) if backward else sum(lengths)
        micro_batches = batching.cut(
            lengths,
            tokens_max=min(self._micro_batch_tokens_max, max(plain_tokens_max, 1)),
            world_size=self._world_size,
        )
        before = model.waiting.copy() if backward else None
        call = _Call(data, lengths, loss_fn, backward)
        in_order = _InOrder(on_result)
        try:
            for start in range(0, len(micro_batches), self._world_size):
                in_turn = micro_batches[start : start + self._world_size]
                # Ranks that walk through a partitioned base together must walk the same way.
                longest = max(sum(lengths[index] for index in indices) for indices in in_turn)
                recompute = backward and longest > plain_tokens_max
                results = self._take_part_together(model, slot, call, in_turn, recompute)
                self._share(data, in_turn, results, in_order)
        except BaseException:
            if backward:
                model.waiting.put_back(before)
            raise
        total = torch.tensor([call.loss], dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        return {"loss:sum": float(total)}

    def _plain_tokens_max(self, slot: Slot) -> int:
        """Tokens whose way back fits into memory without recomputation."""
        if slot.shape not in self._bytes_per_token:

            def run(count: int) -> Any:
                tokens = torch.zeros((1, count), dtype=torch.int64, device=self._device)
                with torch.enable_grad(), self._weights.active(slot.key) as causal_lm:
                    return causal_lm.model(input_ids=tokens, use_cache=False)

            self._bytes_per_token[slot.shape] = memory.activation_bytes_per_token(run)
        return self._activation_bytes_max // self._bytes_per_token[slot.shape]

    def _take_part_together(
        self,
        model: Model,
        slot: Slot,
        call: "_Call",
        in_turn: Sequence[Sequence[int]],
        recompute: bool,
    ) -> dict[int, np.ndarray]:
        """`_take_part`, which fails on every rank where it fails on one: they stay in step."""
        results: dict[int, np.ndarray] = {}
        failure: ResourceExhausted | None = None
        try:
            results = self._take_part(model, slot, call, in_turn, recompute)
        except ResourceExhausted as error:
            failure = error
        if self._world_size > 1:
            failed = torch.tensor([failure is not None], dtype=torch.int32, device=self._device)
            dist.all_reduce(failed, op=dist.ReduceOp.MAX)
            if failure is None and int(failed):
                message = "a datum of this call does not fit into the memory of another rank"
                failure = ResourceExhausted(message, Reason.OUT_OF_MEMORY)
        if failure is not None:
            raise failure
        return results

    def _take_part(
        self,
        model: Model,
        slot: Slot,
        call: "_Call",
        in_turn: Sequence[Sequence[int]],
        recompute: bool,
    ) -> dict[int, np.ndarray]:
        """This rank's part of one round: logprobs by index of the datum."""
        results: dict[int, np.ndarray] = {}

        def compute(indices: Sequence[int], recompute: bool) -> None:
            data = [call.data[index] for index in indices]
            result = self._packed(model, slot, data, call.loss_fn, call.backward, recompute)
            if result.gradients:
                model.waiting.add(result.gradients, slot.zero.layout, slot.zero.padded_count)
            call.loss += result.loss
            results.update(zip(indices, result.logprobs, strict=True))

        if self._rank >= len(in_turn):
            if self._partitioned:
                # Every rank must walk through a partitioned base as often as the others do.
                nothing = _without_weight(call.data[in_turn[0][0]])
                self._packed(model, slot, [nothing], CrossEntropy(), call.backward, recompute)
        elif self._partitioned and self._world_size > 1:
            compute(in_turn[self._rank], recompute)
        else:
            memory.split_on_out_of_memory(compute, in_turn[self._rank], recompute, call.lengths)
        return results

    def _packed(
        self,
        model: Model,
        slot: Slot,
        data: Sequence[Datum],
        loss_fn: LossFn,
        backward: bool,
        recompute: bool,
    ) -> PackedResult:
        with (
            self._weights.active(slot.key) as causal_lm,
            slot.zero.collecting(model.waiting) as sink,
        ):
            return compute_packed(
                causal_lm,
                self._weights.head(slot.key),
                slot.parameters,
                data,
                loss_fn,
                self._device,
                backward=backward,
                recompute=recompute,
                sink=sink,
            )

    def _share(
        self,
        data: Sequence[Datum],
        in_turn: Sequence[Sequence[int]],
        results: Mapping[int, np.ndarray],
        in_order: "_InOrder",
    ) -> None:
        """Give every rank the results of one round."""
        for owner, indices in enumerate(in_turn):
            shapes = [data[index].loss_fn_inputs["target_tokens"].shape for index in indices]
            if self._world_size == 1:
                parts = [results[index] for index in indices]
            else:
                flat = np.empty(sum(map(math.prod, shapes)), np.float32)
                if owner == self._rank:
                    flat = np.concatenate([results[index].reshape(-1) for index in indices])
                shared = torch.from_numpy(flat).to(self._device)
                dist.broadcast(shared, src=owner)
                parts = np.split(
                    shared.cpu().numpy(), np.cumsum([math.prod(shape) for shape in shapes])[:-1]
                )
            for index, shape, part in zip(indices, shapes, parts, strict=True):
                in_order.take(index, part.reshape(shape))

    # --- the rest -----------------------------------------------------------------------------

    def savepoint(self, model_id: str) -> None:
        """Remember the waiting gradients, for `rollback`."""
        self._models.get(model_id).waiting.save()

    def rollback(self, model_id: str) -> None:
        """Put the waiting gradients back to the `savepoint`, and forget it."""
        self._models.get(model_id).waiting.roll_back()

    def optim_step(self, model_id: str, adam: AdamParams) -> Mapping[str, float]:
        """Apply one AdamW step with the waiting gradients and clear them."""
        model, slot = self._models.use(model_id)
        gradients = model.waiting.take(slot.zero.padded_count, self._device)
        try:
            norm = slot.zero.step(gradients, adam)
        except Exception as error:
            raise ModelBroken(f"the step failed half-way: {error}") from error
        if not math.isfinite(norm):
            raise non_finite_gradient()
        return {"grad_norm:last": norm, "step:last": float(slot.zero.step_count)}

    def export_state(self, model_id: str, *, optimizer: bool) -> ModelState:
        """Copy a model's state out, with or without its optimizer state."""
        model, slot = self._models.use(model_id)
        return ModelState(
            tuning=model.tuning,
            weights=slot.zero.values(),
            optimizer=slot.zero.moments() if optimizer else {},
            step_count=slot.zero.step_count,
            config=self._weights.config(slot.key),
            files=self._weights.files(slot.key),
        )

    def import_state(self, model_id: str, state: ModelState, *, optimizer: bool) -> None:
        """Replace a model's weights by `state`'s and drop waiting gradients."""
        model, slot = self._models.use(model_id)
        layout = slot.zero.layout
        shapes = dict(zip(layout.names, layout.shapes, strict=True))
        moments = check_state(model.tuning, shapes, state, optimizer=optimizer)
        try:
            model.waiting.clear()
            slot.zero.load(state.weights, moments, state.step_count)
        except Exception as error:
            raise ModelBroken(f"the import failed half-way: {error}") from error


class _Call:
    """One call to `forward`, and this rank's share of its loss so far."""

    def __init__(
        self, data: Sequence[Datum], lengths: Sequence[int], loss_fn: LossFn, backward: bool
    ) -> None:
        self.data = data
        self.lengths = lengths
        self.loss_fn = loss_fn
        self.backward = backward
        self.loss = 0.0


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


def _smallest(number: int, device: torch.device) -> int:
    """The smallest of the ranks' numbers."""
    shared = torch.tensor([number], device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MIN)
    return int(shared)


def _without_weight(datum: Datum) -> Datum:
    """A datum as long as another, of no effect."""
    targets = datum.loss_fn_inputs["target_tokens"]
    weights = np.zeros(targets.shape, np.float32)
    return Datum(datum.tokens, {"target_tokens": targets, "weights": weights})
