"""The DeepSpeed engine: one rank or many, ZeRO stages 0 to 3.

The engine cuts data into micro-batches by tokens, deals them out to the ranks and computes each in
one forward without padding. Each rank holds its pending gradients in a buffer. A step sums them
over the ranks, once, and hands each rank's slice to a DeepSpeed engine that holds this one adapter
(`zero_adapter`). With stage 3 the ranks share the frozen base, too (`zero_base`).
"""

import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from tinsmithd import failpoints
from tinsmithd.domain import AdamParams, BaseModelInfo, ModelState, Tuning
from tinsmithd.modeling.base import BaseModel
from tinsmithd.modeling.grouped_experts import use_grouped_experts
from tinsmithd.modeling.packing import use_packed_attention
from tinsmithd.modeling.varlen import shape_of, slow_dtype
from tinsmithd.modeling.weight_files import refused
from tinsmithd.modeling.weights import MakeWeights
from tinsmithd.trainer.composition import rounds
from tinsmithd.trainer.composition.compose import compose_data
from tinsmithd.trainer.composition.limits import FoundLimits
from tinsmithd.trainer.composition.rounds import MicroBatch, Round
from tinsmithd.trainer.compute import memory, spread
from tinsmithd.trainer.compute.determinism import Determinism, layer_trial
from tinsmithd.trainer.engines import identity
from tinsmithd.trainer.engines.checks import check_state, non_finite_gradient
from tinsmithd.trainer.engines.deepspeed import sums
from tinsmithd.trainer.engines.deepspeed.batch_run import BatchRun
from tinsmithd.trainer.engines.deepspeed.residency import RankContext, ResidentModels, Slot
from tinsmithd.trainer.engines.deepspeed.zero_adapter import ZeroConfig
from tinsmithd.trainer.engines.deepspeed.zero_base import init_deepspeed, start, without_weights
from tinsmithd.trainer.engines.interface import Batch, ForwardResult, ModelBroken, OnOutput
from tinsmithd.trainer.prefixes import lay_out
from tinsmithd.trainer.process_group import distributed

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
_log = logging.getLogger(__name__)


class DeepSpeedEngine:
    """See `TrainingEngine`.

    Args:
        base: The base model; it is changed in place. In stage 3 it was loaded by `zero_base.share`.
        make_weights: Makes what is trained of the base.
        changes_base: Whether the weights of the base are trained.
        zero: How models are spread over the ranks.
        micro_batch_tokens_max: Maximum tokens that a rank computes together; a longer datum is a
            micro-batch by itself.
        share_prefixes: Whether what data of a call begin with is computed once.
        sequence_parallel: Number of ranks that may compute a longer datum together; it divides
            their number, and the model's heads can be shared out to them (`compute.spread`).
        resident_models_max: Maximum models on the device at once; others wait in host memory.
        activation_bytes_max: Maximum bytes that a rank keeps for the backward pass before it
            recomputes layers instead; 0 takes half of what is free now.
        determinism: Decides whether GPUs give the same bits each time.
    """

    def __init__(
        self,
        base: BaseModel,
        make_weights: MakeWeights,
        *,
        changes_base: bool,
        zero: ZeroConfig,
        micro_batch_tokens_max: int,
        share_prefixes: bool,
        sequence_parallel: int,
        resident_models_max: int,
        activation_bytes_max: int,
        determinism: Determinism,
    ) -> None:
        self._device = distributed.init()
        init_deepspeed()
        _check_alike(base, self._device)
        if not changes_base and (why := slow_dtype(self._device, base.info.dtype)):
            _log.warning("%s", why)
        self._micro_batch_tokens_max = micro_batch_tokens_max
        self._share_prefixes = share_prefixes
        self._sequence_parallel = sequence_parallel
        self._base = base
        # Gathered copies of trained weights get stale, so none may be kept.
        if changes_base:
            zero = replace(zero, gathered_bytes_max=0)
        if zero.stage == 3:
            with without_weights(base.model):
                self._attention_kernel = use_packed_attention(base)
        else:
            self._attention_kernel = use_packed_attention(base)
        use_grouped_experts(base)
        in_order = determinism.decide(
            self._device, lambda: layer_trial(base.model.config, self._device, base.model.dtype)
        )
        self._zero = zero = replace(zero, in_order=bool(_smallest(in_order, self._device)))
        self._partition = start(base.model, zero) if zero.stage == 3 else None
        self._weights = make_weights(base)
        self._context = RankContext(
            self._weights,
            self._device,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            partitioned=zero.stage == 3,
        )
        self._models = ResidentModels(
            self._context, zero, self._release, resident_models_max=resident_models_max
        )
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        bytes_max = memory.activation_bytes_max(activation_bytes_max, self._device, ranks_here)
        self._activation_bytes_max = _smallest(bytes_max, self._device)
        self._bytes_per_token: dict[Tuning, int] = {}
        self._limits = FoundLimits()

    @property
    def info(self) -> BaseModelInfo:
        """The base model that this engine holds."""
        return self._base.info

    @property
    def identity(self) -> Mapping[str, str]:
        """All that the last bit of a result depends on, besides calls and their compositions."""
        # No number depends on `micro_batch_tokens_max`, `share_prefixes`, `sequence_parallel` or
        # `activation_bytes_max`, which decide a batch's composition alone; on `gathered_bytes_max`,
        # since weights have the same values whenever they are gathered; or on
        # `resident_models_max`, since a model leaves the device and comes back by copying.
        # A kernel that computes attention is named where there is one.
        said = {"attention_kernel": self._attention_kernel} if self._attention_kernel else {}
        said |= {"deterministic": "True"} if self._zero.in_order else {}
        return identity.describe(
            "deepspeed",
            self._base,
            self._device,
            **said,
            world_size=self._context.world_size,
            zero_stage=self._zero.stage,
            offload=self._zero.offload,
        )

    def create_model(self, model_id: str, tuning: Tuning) -> None:
        """Add a model with its first values and no optimizer state.

        Raises:
            InvalidArgument: An adapter would stand on layers that the base has none of.
        """
        self._models.add(model_id, tuning)

    def delete_model(self, model_id: str) -> None:
        """Drop a model; an unknown id is no error."""
        self._models.remove(model_id)
        self._limits.forget()

    def _release(self) -> None:
        """Make every rank drop what it gathered of a partitioned base."""
        if self._partition is not None:
            self._partition.optimizer.partition_all_parameters()

    def close(self) -> None:
        """Free what DeepSpeed holds; nobody uses the engine any more."""
        self._models.close()
        if self._partition is not None:
            self._partition.destroy()

    # --- forward and backward -----------------------------------------------------------------

    def forward(self, batch: Batch, on_output: OnOutput) -> ForwardResult:
        """Compute the summed loss and, with `backward`, add its gradients to the pending ones."""
        given = self._read(batch) if batch.composition else None
        model, slot = self._models.use(batch.model_id)
        composed = self._compose(slot, batch) if given is None else given
        for ranks in sorted({rounds.spread_over(round_) for round_ in composed} - {1}):
            if ranks not in self._context.groups:
                self._context.groups[ranks] = distributed.neighbours(ranks)
        before = model.pending.copy() if batch.backward else None
        run = BatchRun(self._context, model, slot, batch)
        try:
            run.run(composed, on_output)
        except BaseException:
            if batch.backward:
                model.pending.put_back(before)
            raise
        if given is None:

            def tokens_of(micro_batch: MicroBatch) -> int:
                rows = [batch.data[index].tokens for index in micro_batch.indices]
                return lay_out(rows, share=micro_batch.shares).count

            self._limits.learn((slot.shape, batch.backward), tokens_of, composed, run.executed)
        non_finite = batch.backward and not model.pending.all_finite()
        totals = torch.stack([run.loss, torch.full_like(run.loss, non_finite)])
        sums.all_reduce(totals, in_order=self._zero.in_order)
        loss, non_finite_ranks = totals.tolist()
        composition = rounds.encode(run.executed, self._context.world_size)
        return ForwardResult({"loss:sum": loss}, composition, non_finite=non_finite_ranks > 0)

    def _read(self, batch: Batch) -> list[Round]:
        found = rounds.decode(
            batch.composition,
            data_count=len(batch.data),
            world_size=self._context.world_size,
            in_step=self._context.in_step,
        )
        for micro_batch in (m for round_ in found for of_rank in round_ for m in of_rank):
            ranks = micro_batch.ranks
            tokens = sum(len(batch.data[index].tokens) for index in micro_batch.indices)
            if ranks > 1 and (tokens < ranks or spread.problem(self._base.model.config, ranks)):
                message = f"the composition spreads {tokens} tokens over {ranks} ranks"
                raise rounds.CompositionMismatch(f"{message}, which this model does not allow")
        return found

    def _compose(self, slot: Slot, batch: Batch) -> list[Round]:
        kind = slot.shape, batch.backward
        tokens_max, plain_tokens_max = self._limits.apply(
            kind,
            self._micro_batch_tokens_max,
            self._plain_tokens_max(slot) if batch.backward else None,
        )
        return compose_data(
            [datum.tokens for datum in batch.data],
            share=self._share_prefixes,
            tokens_max=tokens_max,
            plain_tokens_max=plain_tokens_max,
            world_size=self._context.world_size,
            in_step=self._context.in_step,
            sequence_parallel=self._sequence_parallel,
            long_tokens_max=self._limits.tokens_max(kind),
            context_key_tokens=self._context_key_tokens(slot),
        )

    def _context_key_tokens(self, slot: Slot) -> float:
        """What a key of a segment above keeps for the backward pass, in tokens."""
        if not self._attention_kernel:  # the loop keeps none, see `modeling.in_context`
            return 0.0
        shape, base = shape_of(self._base.model.config), self._base.model
        layers = base.config.num_hidden_layers
        key_bytes: int = 2 * layers * shape.kv_heads * shape.head_size * base.dtype.itemsize
        return key_bytes / max(self._bytes_per_token.get(slot.shape, key_bytes), key_bytes)

    def _plain_tokens_max(self, slot: Slot) -> int:
        """Maximum tokens whose activations fit into memory, so that no layer is recomputed."""
        if slot.shape not in self._bytes_per_token:

            def run(count: int) -> Any:
                tokens = torch.zeros((1, count), dtype=torch.int64, device=self._device)
                with torch.enable_grad(), self._weights.active(slot.key) as causal_lm:
                    return causal_lm.model(input_ids=tokens, use_cache=False)

            found = self._measure(run)
            if found is None:
                return 0
            self._bytes_per_token[slot.shape] = found
        return self._activation_bytes_max // self._bytes_per_token[slot.shape]

    def _measure(self, run: Callable[[int], Any]) -> int | None:
        """Bytes that a token keeps; None, on all ranks, where one has no memory to find out now."""
        if self._context.in_step:  # running out of memory ends the group
            return memory.activation_bytes_per_token(run)
        found = [0]
        reason = memory.shortage(lambda: found.append(memory.activation_bytes_per_token(run)))
        if reason is not None:
            _log.warning("out of memory with a few tokens: recomputing all layers: %s", reason)
        return _smallest(found[-1], self._device) or None

    # --- the rest -----------------------------------------------------------------------------

    def savepoint(self, model_id: str) -> None:
        """Remember the pending gradients, for `rollback`."""
        self._models.get(model_id).pending.save()

    def rollback(self, model_id: str) -> None:
        """Put the pending gradients back to the `savepoint`, and forget it."""
        self._models.get(model_id).pending.roll_back()

    def optim_step(self, model_id: str, adam: AdamParams) -> Mapping[str, float]:
        """Apply one AdamW step with the pending gradients and clear them."""
        failpoints.hit("pre_optim")
        model, slot = self._models.use(model_id)
        gradients = model.pending.take(slot.zero.padded_count, self._device)
        try:
            norm = slot.zero.step(gradients, adam)
            failpoints.hit("post_optim_pre_ack")
        except Exception as error:
            raise ModelBroken(f"the step failed half-way: {error}") from error
        if slot.zero.step_count == 1:
            slot.zero.prepare_copies()
        if not math.isfinite(norm):
            raise non_finite_gradient()
        return {"grad_norm:last": norm, "step:last": float(slot.zero.step_count)}

    def export_state(self, model_id: str, *, optimizer: bool) -> ModelState:
        """Copy a model's state to the first rank, with or without its optimizer state."""
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
        """Replace a model's weights by `state`'s and drop its pending gradients."""
        model, slot = self._models.use(model_id)
        layout = slot.zero.layout
        shapes = dict(zip(layout.names, layout.shapes, strict=True))
        moments = check_state(model.tuning, shapes, state, optimizer=optimizer)
        try:
            model.pending.clear()
            slot.zero.load(state.weights, moments, state.step_count)
        except Exception as error:
            raise ModelBroken(f"the import failed half-way: {error}") from error


def _check_alike(base: BaseModel, device: torch.device) -> None:
    """Refuse a base model of which rank 0 has read another one: their weights would be mixed.

    Raises:
        NotFound: See above, on all ranks (BASE_MODEL_NOT_FOUND).
    """
    own = torch.tensor(list(bytes.fromhex(base.fingerprint)), dtype=torch.uint8, device=device)
    first = own.clone()
    dist.broadcast(first, src=0)
    if not _smallest(torch.equal(own, first), device):
        raise refused(base.info.name, "its files are not the same on all hosts of the rank group")


def _smallest(number: int, device: torch.device) -> int:
    """The smallest of the ranks' numbers."""
    shared = torch.tensor([number], device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MIN)
    return int(shared)
