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

import torch
import torch.distributed as dist

from tinsmithd import failpoints
from tinsmithd.domain import AdamParams, BaseModelInfo, Datum, LossFn, ModelState, Tuning
from tinsmithd.errors import InvalidArgument
from tinsmithd.modeling.base import BaseModel
from tinsmithd.modeling.full import FullWeights
from tinsmithd.modeling.lora import Adapters
from tinsmithd.modeling.packing import use_packed_attention
from tinsmithd.trainer.compute import batching
from tinsmithd.trainer.engines import identity, memory
from tinsmithd.trainer.engines import plan as plans
from tinsmithd.trainer.engines.deepspeed import distributed
from tinsmithd.trainer.engines.deepspeed.residency import ResidentModels, Slot
from tinsmithd.trainer.engines.deepspeed.rounds import Call, Place
from tinsmithd.trainer.engines.deepspeed.zero_adapter import ZeroConfig
from tinsmithd.trainer.engines.deepspeed.zero_base import partition
from tinsmithd.trainer.engines.interface import ForwardResult, ModelBroken, OnResult
from tinsmithd.trainer.engines.plan import MicroBatch, Round
from tinsmithd.trainer.engines.reference import check_state, non_finite_gradient

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
        self._micro_batch_tokens_max = micro_batch_tokens_max
        self._base = base
        use_packed_attention(base)
        self._zero = zero
        # What is trained does get stale, so no gathered copy of it may be kept.
        if full:
            zero = replace(zero, gathered_bytes_max=0)
        self._partition = partition(base.model, zero) if zero.stage == 3 else None
        self._weights = FullWeights(base) if full else Adapters(base, fused=True)
        self._place = Place(
            self._weights,
            self._device,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            partitioned=zero.stage == 3,
        )
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

    @property
    def identity(self) -> Mapping[str, str]:
        """All that the last bit of a result may depend on, besides calls and their plans."""
        # Not in here, since no number depends on it: `micro_batch_tokens_max` and
        # `activation_bytes_max`, which only say how a call is composed, and plans have that;
        # `gathered_bytes_max`, since weights have the same values whenever they are gathered; and
        # `resident_models_max`, since a model leaves the device and comes back by copying.
        return identity.describe(
            "deepspeed",
            self._base,
            self._device,
            world_size=self._place.world_size,
            zero_stage=self._zero.stage,
            offload=self._zero.offload,
        )

    def create_model(self, model_id: str, tuning: Tuning) -> None:
        """Add a model with its first values and no optimizer state.

        Raises:
            InvalidArgument: An adapter would stand on experts of a partitioned base, or on what
                the base has none of.
        """
        weights = self._weights
        if (
            self._place.partitioned
            and isinstance(weights, Adapters)
            and weights.adapts_parameters(tuning)
        ):
            message = (
                "experts, and the layers of a model that can have them, cannot be adapted under "
                "ZeRO stage 3; set it to false"
            )
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
        plan: bytes = b"",
    ) -> ForwardResult:
        """Compute the summed loss and, with `backward`, add its gradients to those waiting."""
        given = self._read(plan, len(data)) if plan else None
        model, slot = self._models.use(model_id)
        rounds = self._compose(slot, data, backward) if given is None else given
        before = model.waiting.copy() if backward else None
        call = Call(
            self._place, model, slot, data, loss_fn, backward=backward, exactly=given is not None
        )
        try:
            call.run(rounds, on_result)
        except BaseException:
            if backward:
                model.waiting.put_back(before)
            raise
        non_finite = backward and not model.waiting.all_finite()
        totals = torch.tensor([call.loss, non_finite], dtype=torch.float64, device=self._device)
        dist.all_reduce(totals)
        loss, non_finite_ranks = totals.tolist()
        plan = plans.encode(call.executed, self._place.world_size)
        return ForwardResult({"loss:sum": loss}, plan, non_finite=non_finite_ranks > 0)

    def _read(self, plan: bytes, data_count: int) -> list[Round]:
        return plans.decode(
            plan,
            data_count=data_count,
            world_size=self._place.world_size,
            in_step=self._place.in_step,
        )

    def _compose(self, slot: Slot, data: Sequence[Datum], backward: bool) -> list[Round]:
        """Choose what is computed together, and on which rank."""
        lengths = [len(datum.tokens) for datum in data]
        world_size = self._place.world_size
        plain_tokens_max = self._plain_tokens_max(slot) if backward else sum(lengths)
        micro_batches = batching.cut(
            lengths,
            tokens_max=min(self._micro_batch_tokens_max, max(plain_tokens_max, 1)),
            world_size=world_size,
        )
        rounds: list[Round] = []
        for start in range(0, len(micro_batches), world_size):
            in_turn = micro_batches[start : start + world_size]
            # Ranks that walk through a partitioned base together must walk the same way.
            longest = max(sum(lengths[index] for index in indices) for indices in in_turn)
            recompute = backward and longest > plain_tokens_max
            of_ranks: list[tuple[MicroBatch, ...]] = [()] * world_size
            for rank, indices in enumerate(in_turn):
                of_ranks[rank] = (MicroBatch(tuple(indices), recompute),)
            rounds.append(tuple(of_ranks))
        return rounds

    def _plain_tokens_max(self, slot: Slot) -> int:
        """Tokens whose way back fits into memory without recomputation."""
        if slot.shape not in self._bytes_per_token:

            def run(count: int) -> Any:
                tokens = torch.zeros((1, count), dtype=torch.int64, device=self._device)
                with torch.enable_grad(), self._weights.active(slot.key) as causal_lm:
                    return causal_lm.model(input_ids=tokens, use_cache=False)

            self._bytes_per_token[slot.shape] = memory.activation_bytes_per_token(run)
        return self._activation_bytes_max // self._bytes_per_token[slot.shape]

    # --- the rest -----------------------------------------------------------------------------

    def savepoint(self, model_id: str) -> None:
        """Remember the waiting gradients, for `rollback`."""
        self._models.get(model_id).waiting.save()

    def rollback(self, model_id: str) -> None:
        """Put the waiting gradients back to the `savepoint`, and forget it."""
        self._models.get(model_id).waiting.roll_back()

    def optim_step(self, model_id: str, adam: AdamParams) -> Mapping[str, float]:
        """Apply one AdamW step with the waiting gradients and clear them."""
        failpoints.hit("pre_optim")
        model, slot = self._models.use(model_id)
        gradients = model.waiting.take(slot.zero.padded_count, self._device)
        try:
            norm = slot.zero.step(gradients, adam)
            failpoints.hit("post_optim_pre_ack")
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


def _smallest(number: int, device: torch.device) -> int:
    """The smallest of the ranks' numbers."""
    shared = torch.tensor([number], device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MIN)
    return int(shared)
