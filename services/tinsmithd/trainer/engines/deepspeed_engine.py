"""The DeepSpeed engine: one rank or many, ZeRO stages 1 to 3.

Data are cut into micro-batches by tokens, each computed in one forward without padding, and dealt
out to the ranks; gradients wait in buffers on each rank.
A step hands them to a DeepSpeed engine that holds this one adapter: it reduces them over the
ranks, keeps its share of the optimizer state and gathers the new weights. That way a failed
call is undone by restoring a buffer, and gradients travel once per step, not once per call.

With stage 3 the frozen base is partitioned over the ranks too, before PEFT wraps it.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state

from tinsmithd.domain import (
    AdamParams,
    AdapterState,
    BaseModelInfo,
    CrossEntropy,
    Datum,
    LoraConfig,
    LossFn,
)
from tinsmithd.modeling.base import BaseModel
from tinsmithd.modeling.lora import Adapters
from tinsmithd.modeling.packing import use_packed_attention
from tinsmithd.trainer.engines import distributed
from tinsmithd.trainer.engines.compute import DatumResult, WaitingGradients, compute_data
from tinsmithd.trainer.engines.interface import ModelBroken, OnResult
from tinsmithd.trainer.engines.reference import EPS_MIN, check_state, non_finite_gradient

MOMENTS = ("exp_avg", "exp_avg_sq")

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


class _Parameters(torch.nn.Module):
    """What a DeepSpeed engine holds: an adapter's parameters, and their product with gradients."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        super().__init__()
        copies = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
        self.values = torch.nn.ParameterList(copies)

    def forward(self, gradients: Sequence[torch.Tensor], factor: float) -> torch.Tensor:
        """A scalar whose gradient is `factor * gradients`, exactly."""
        products = [(p * g).sum() for p, g in zip(self.values, gradients, strict=True)]
        return torch.stack(products).sum() * factor


class _Model:
    """One adapter, its waiting gradients, and the DeepSpeed engine that steps it."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], zero_stage: int) -> None:
        self.names = list(parameters)
        self.parameters = list(parameters.values())
        self.waiting = WaitingGradients(self.parameters)
        self._zero_stage = zero_stage
        self._engine: Any = None
        self.reset_optimizer()

    def reset_optimizer(self) -> None:
        """Begin with the parameters as they are now, without moments."""
        self.close()
        module = _Parameters(self.parameters)
        self.step_count = 0
        self._adamw = torch.optim.AdamW(module.parameters(), lr=0.0)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": 0.0,  # DeepSpeed's default is 1; steps set their own
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
            "zero_optimization": {"stage": min(self._zero_stage, 2)},
        }
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=self._adamw, config=config, dist_init_required=False
        )
        # DeepSpeed moved the values into one flat buffer: let the adapter look there.
        for parameter, value in zip(self.parameters, module.values, strict=True):
            parameter.data = value.data
        self._values = list(module.values)

    def step(self, gradients: Sequence[torch.Tensor], adam: AdamParams) -> float:
        """Reduce, clip and apply gradients; returns their norm before clipping.

        Where that norm is not finite, DeepSpeed applies nothing and this counts no step.
        """
        zero = self._engine.optimizer
        zero.clip_grad = adam.grad_clip_norm
        for group in [*zero.param_groups, *zero.optimizer.param_groups]:
            group["lr"] = adam.learning_rate
            group["betas"] = (adam.beta1, adam.beta2)
            group["eps"] = max(adam.eps, EPS_MIN)
            group["weight_decay"] = adam.weight_decay
        # DeepSpeed averages over the ranks; this API sums.
        self._engine.backward(self._engine(gradients, float(dist.get_world_size())))
        self._engine.step()
        if zero.overflow:
            return math.inf
        self.step_count += 1
        return float(self._engine.get_global_grad_norm())

    def moments(self) -> dict[str, np.ndarray]:
        """Whole moments, gathered from the ranks, as `<kind>.<name>`."""
        found: dict[str, np.ndarray] = {}
        for kind in MOMENTS:
            for name, value in zip(self.names, self._values, strict=True):
                whole = safe_get_full_optimizer_state(value, kind)
                found[f"{kind}.{name}"] = whole.detach().cpu().numpy().copy()
        return found

    def set_moments(self, moments: Mapping[str, Mapping[str, np.ndarray]], step_count: int) -> None:
        """Continue with given moments; call it after `reset_optimizer`."""
        # The state comes into being with a first step: one that moves nothing.
        zeros = [torch.zeros_like(p) for p in self.parameters]
        self.step(zeros, AdamParams(learning_rate=0.0, eps=1.0))
        for kind in MOMENTS:
            for name, value in zip(self.names, self._values, strict=True):
                whole = torch.from_numpy(moments[kind][name].copy()).to(value.device)
                safe_set_full_optimizer_state(value, whole, kind)
        for state in self._adamw.state.values():
            state["step"].fill_(step_count)
        self.step_count = step_count

    def close(self) -> None:
        """Free what DeepSpeed holds."""
        if self._engine is not None:
            # The adapter must not look into buffers that are about to go.
            for parameter in self.parameters:
                parameter.data = parameter.data.clone()
            self._engine.destroy()
            self._engine = None


class DeepSpeedEngine:
    """See `TrainingEngine`."""

    def __init__(self, base: BaseModel, *, zero_stage: int, micro_batch_tokens_max: int) -> None:
        self._device = distributed.init()
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._zero_stage = zero_stage
        self._micro_batch_tokens_max = micro_batch_tokens_max
        self._base = base
        use_packed_attention(base.model)
        if zero_stage == 3:
            _partition(base.model)
        self._adapters = Adapters(base)
        self._models: dict[str, _Model] = {}

    @property
    def info(self) -> BaseModelInfo:
        """The base model that this engine holds."""
        return self._base.info

    def create_model(self, model_id: str, lora: LoraConfig) -> None:
        """Add a model: A drawn from `lora.seed`, B zero, no optimizer state."""
        self._adapters.add(model_id, lora)
        parameters = self._adapters.parameters(model_id)
        self._models[model_id] = _Model(parameters, self._zero_stage)

    def delete_model(self, model_id: str) -> None:
        """Drop a model; an unknown id is no error."""
        model = self._models.pop(model_id, None)
        if model is not None:
            model.close()
        self._adapters.remove(model_id)

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
        model = self._models[model_id]
        snapshot = model.waiting.snapshot()
        gradients = model.waiting.buffers() if backward else None
        micro_batches = self._cut(data)
        loss = 0.0
        try:
            with self._adapters.active(model_id) as causal_lm:
                for start in range(0, len(micro_batches), self._world_size):
                    in_turn = micro_batches[start : start + self._world_size]
                    results: Sequence[DatumResult] = ()
                    if self._rank < len(in_turn):
                        mine = [data[index] for index in in_turn[self._rank]]
                        results = compute_data(
                            causal_lm, model.parameters, mine, loss_fn, gradients, self._device
                        )
                        loss += sum(result.loss for result in results)
                    else:
                        self._idle(causal_lm, model, data[in_turn[0][0]], gradients)
                    self._share(data, in_turn, results, on_result)
        except BaseException:
            model.waiting.restore(snapshot)
            raise
        total = torch.tensor([loss], dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        return {"loss:sum": float(total)}

    def _cut(self, data: Sequence[Datum]) -> list[list[int]]:
        """Indices of the data of each micro-batch: neighbours, up to the token budget.

        The budget shrinks where it would leave ranks without work.
        """
        share = -(-sum(len(datum.tokens) for datum in data) // self._world_size)
        budget = min(self._micro_batch_tokens_max, share)
        micro_batches: list[list[int]] = []
        room = 0
        for index, datum in enumerate(data):
            if len(datum.tokens) > room or not micro_batches:
                micro_batches.append([])
                room = budget
            micro_batches[-1].append(index)
            room -= len(datum.tokens)
        return micro_batches

    def _idle(
        self,
        causal_lm: Any,
        model: _Model,
        datum: Datum,
        gradients: Sequence[torch.Tensor] | None,
    ) -> None:
        # With a partitioned base every rank must walk through it as often as the others do.
        if self._zero_stage == 3:
            unused = None if gradients is None else [torch.zeros_like(g) for g in gradients]
            targets = datum.loss_fn_inputs["target_tokens"]
            weights = np.zeros(targets.shape, np.float32)
            nothing = Datum(datum.tokens, {"target_tokens": targets, "weights": weights})
            compute_data(
                causal_lm, model.parameters, [nothing], CrossEntropy(), unused, self._device
            )

    def _share(
        self,
        data: Sequence[Datum],
        micro_batches: Sequence[Sequence[int]],
        results: Sequence[DatumResult],
        on_result: OnResult,
    ) -> None:
        """Give every rank the results of one round, in the data's order."""
        for owner, indices in enumerate(micro_batches):
            shapes = [data[index].loss_fn_inputs["target_tokens"].shape for index in indices]
            if owner == self._rank:
                flat = np.concatenate([result.logprobs.reshape(-1) for result in results])
            else:
                flat = np.empty(sum(map(math.prod, shapes)), np.float32)
            if self._world_size > 1:
                shared = torch.from_numpy(flat).to(self._device)
                dist.broadcast(shared, src=owner)
                flat = shared.cpu().numpy()
            parts = np.split(flat, np.cumsum([math.prod(shape) for shape in shapes])[:-1])
            for index, shape, part in zip(indices, shapes, parts, strict=True):
                on_result(index, {"logprobs": part.reshape(shape)})

    def optim_step(self, model_id: str, adam: AdamParams) -> Mapping[str, float]:
        """Apply one AdamW step with the waiting gradients and clear them."""
        model = self._models[model_id]
        gradients = model.waiting.buffers()
        finite = torch.tensor([model.waiting.all_finite()], dtype=torch.int32, device=self._device)
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        model.waiting.clear()
        if not int(finite):
            raise non_finite_gradient()
        try:
            norm = model.step(gradients, adam)
        except Exception as error:
            raise ModelBroken(f"the step failed half-way: {error}") from error
        if not math.isfinite(norm):
            raise non_finite_gradient()
        return {"grad_norm:last": norm, "step:last": float(model.step_count)}

    def export_state(self, model_id: str, *, optimizer: bool) -> AdapterState:
        """Copy a model's state out, with or without its optimizer state."""
        model = self._models[model_id]
        return AdapterState(
            lora=self._adapters.lora(model_id),
            weights=self._adapters.export_weights(model_id),
            optimizer=model.moments() if optimizer and model.step_count else {},
            step_count=model.step_count,
            peft_config=self._adapters.adapter_config(model_id),
        )

    def import_state(self, model_id: str, state: AdapterState, *, optimizer: bool) -> None:
        """Replace a model's weights by `state`'s and drop waiting gradients."""
        model = self._models[model_id]
        parameters = self._adapters.parameters(model_id)
        moments = check_state(self._adapters.lora(model_id), parameters, state, optimizer=optimizer)
        try:
            self._adapters.import_weights(model_id, state.weights)
            model.waiting.clear()
            model.reset_optimizer()
            if moments is not None:
                model.set_moments(moments, state.step_count)
        except Exception as error:
            raise ModelBroken(f"the import failed half-way: {error}") from error


def _partition(model: Any) -> None:
    """Leave each rank its share of the frozen weights; hooks gather them as they are needed."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": None,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    deepspeed.initialize(model=model, config=config, dist_init_required=False)
