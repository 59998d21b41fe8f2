"""The reference engine: plain PyTorch and PEFT, one process, one datum at a time.

It is the executable specification: it is written to be read, and every other engine must agree with
it. Its AdamW is spelled out rather than taken from torch.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from tinsmithd import failpoints
from tinsmithd.domain import (
    MOMENTS,
    AdamParams,
    BaseModelInfo,
    ModelState,
    Tuning,
)
from tinsmithd.modeling.base import BaseModel
from tinsmithd.modeling.lora import Adapters
from tinsmithd.modeling.trained import TrainedWeights
from tinsmithd.trainer import progress
from tinsmithd.trainer.compute.adamw import clip_scale, eps_of
from tinsmithd.trainer.compute.plain import compute_datum
from tinsmithd.trainer.engines import identity
from tinsmithd.trainer.engines.checks import check_state, non_finite_gradient
from tinsmithd.trainer.engines.interface import (
    Batch,
    CompositionMismatch,
    ForwardResult,
    ModelBroken,
    OnOutput,
)

COMPOSITION = b"one by one"
"""The composition of every batch."""


class _Model:
    """The parameters that one model trains, its pending gradients and its Adam moments."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self.names = list(parameters)
        self.parameters = list(parameters.values())
        self.gradients: list[torch.Tensor] | None = None
        self.savepoint: list[torch.Tensor] | None = None
        self.reset_optimizer()

    def pending(self) -> list[torch.Tensor]:
        """The pending gradients, zeros where there are none."""
        if self.gradients is None:
            self.gradients = [torch.zeros_like(p) for p in self.parameters]
        return self.gradients

    def copy(self) -> list[torch.Tensor] | None:
        """A copy of the pending gradients, to go back to."""
        return None if self.gradients is None else [g.clone() for g in self.gradients]

    def reset_optimizer(self) -> None:
        self.step_count = 0
        self.exp_avg = [torch.zeros_like(p) for p in self.parameters]
        self.exp_avg_sq = [torch.zeros_like(p) for p in self.parameters]


class ReferenceEngine:
    """See `TrainingEngine`.

    Args:
        base: The base model; it is changed in place.
        weights: The weights that are trained; None stands for adapters.
    """

    def __init__(self, base: BaseModel, weights: TrainedWeights | None = None) -> None:
        self._base = base
        self._weights = weights or Adapters(base)
        self._models: dict[str, _Model] = {}
        self._device = next(base.model.parameters()).device

    def close(self) -> None:
        """Do nothing: memory goes with the engine."""

    @property
    def info(self) -> BaseModelInfo:
        """The base model that this engine holds."""
        return self._base.info

    @property
    def identity(self) -> Mapping[str, str]:
        """All that the last bit of a result depends on, besides calls and their compositions."""
        return identity.describe("reference", self._base, self._device, world_size=1)

    def create_model(self, model_id: str, tuning: Tuning) -> None:
        """Add a model with its first values and no optimizer state."""
        self._weights.add(model_id, tuning)
        self._models[model_id] = _Model(self._weights.parameters(model_id))

    def delete_model(self, model_id: str) -> None:
        """Drop a model; an unknown id is no error."""
        self._models.pop(model_id, None)
        self._weights.remove(model_id)

    def forward(self, batch: Batch, on_output: OnOutput) -> ForwardResult:
        """Compute the summed loss and, with `backward`, add its gradients to the pending ones."""
        if batch.composition not in (b"", COMPOSITION):
            raise CompositionMismatch("not a composition of this engine, which computes one by one")
        failpoint = "mid_backward" if batch.backward else "mid_forward"
        model = self._models[batch.model_id]
        before = model.copy()
        gradients = model.pending() if batch.backward else None
        loss = 0.0
        try:
            with self._weights.active(batch.model_id) as causal_lm:
                head = self._weights.head(batch.model_id)
                for index, datum in enumerate(batch.data):
                    if index:
                        failpoints.hit(failpoint)
                    result = compute_datum(
                        causal_lm,
                        head,
                        model.parameters,
                        datum,
                        batch.loss_fn,
                        gradients,
                        self._device,
                    )
                    loss += result.loss
                    progress.made()
                    if len(batch.data) == 1:
                        failpoints.hit(failpoint)
                    on_output(index, {"logprobs": result.logprobs})
        except BaseException:
            model.gradients = before
            raise
        finite = all(bool(gradient.isfinite().all()) for gradient in gradients or ())
        return ForwardResult({"loss:sum": loss}, COMPOSITION, non_finite=not finite)

    def savepoint(self, model_id: str) -> None:
        """Remember the pending gradients, for `rollback`."""
        self._models[model_id].savepoint = self._models[model_id].copy()

    def rollback(self, model_id: str) -> None:
        """Put the pending gradients back to the `savepoint`, and forget it."""
        model = self._models[model_id]
        model.gradients, model.savepoint = model.savepoint, None

    @torch.no_grad()
    def optim_step(self, model_id: str, adam: AdamParams) -> Mapping[str, float]:
        """Apply one AdamW step with the pending gradients and clear them."""
        failpoints.hit("pre_optim")
        model = self._models[model_id]
        gradients = model.pending()
        model.gradients = model.savepoint = None
        # Finite gradients can have an infinite norm, and their squares would spoil the moments.
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))
        if not bool(torch.isfinite(norm)):
            raise non_finite_gradient()
        try:
            _adamw(model, gradients, clip_scale(float(norm), adam), adam)
            failpoints.hit("post_optim_pre_ack")
        except Exception as error:
            raise ModelBroken(f"the step failed half-way: {error}") from error
        return {"grad_norm:last": float(norm), "step:last": float(model.step_count)}

    def export_state(self, model_id: str, *, optimizer: bool) -> ModelState:
        """Copy a model's state, with or without its optimizer state."""
        model = self._models[model_id]
        moments: dict[str, np.ndarray] = {}
        if optimizer and model.step_count:
            for kind in MOMENTS:
                for name, moment in zip(model.names, getattr(model, kind), strict=True):
                    moments[f"{kind}.{name}"] = moment.cpu().numpy().copy()
        return ModelState(
            tuning=self._weights.tuning(model_id),
            weights=self._weights.export_weights(model_id),
            optimizer=moments,
            step_count=model.step_count,
            config=self._weights.config(model_id),
            files=self._weights.files(model_id),
        )

    def import_state(self, model_id: str, state: ModelState, *, optimizer: bool) -> None:
        """Replace a model's weights by `state`'s and drop its pending gradients."""
        model = self._models[model_id]
        parameters = self._weights.parameters(model_id)
        moments = check_state(
            self._weights.tuning(model_id),
            {name: tuple(parameter.shape) for name, parameter in parameters.items()},
            state,
            optimizer=optimizer,
        )
        self._weights.import_weights(model_id, state.weights)
        model.gradients = None
        model.reset_optimizer()
        if moments is not None:
            model.step_count = state.step_count
            for i, name in enumerate(model.names):
                model.exp_avg[i].copy_(torch.from_numpy(moments["exp_avg"][name].copy()))
                model.exp_avg_sq[i].copy_(torch.from_numpy(moments["exp_avg_sq"][name].copy()))


def _adamw(
    model: _Model, gradients: Sequence[torch.Tensor], scale: float, adam: AdamParams
) -> None:
    """Make one step (Loshchilov & Hutter 2019, algorithm 2, with schedule eta = lr)."""
    model.step_count += 1
    correction1 = 1 - adam.beta1**model.step_count
    correction2 = 1 - adam.beta2**model.step_count
    for i, parameter in enumerate(model.parameters):
        if i == len(model.parameters) // 2:
            failpoints.hit("mid_optim")
        gradient = gradients[i] * scale
        model.exp_avg[i].lerp_(gradient, 1 - adam.beta1)
        model.exp_avg_sq[i].mul_(adam.beta2).addcmul_(gradient, gradient, value=1 - adam.beta2)
        parameter.mul_(1 - adam.learning_rate * adam.weight_decay)
        denominator = model.exp_avg_sq[i].sqrt() / correction2**0.5 + eps_of(adam)
        parameter.addcdiv_(model.exp_avg[i], denominator, value=-adam.learning_rate / correction1)
