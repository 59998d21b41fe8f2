"""AdamW on this rank's slice of what a model trains: the same whichever way ZeRO cuts it."""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tinsmithd import failpoints
from tinsmithd.domain import MOMENTS, AdamParams
from tinsmithd.trainer.compute.adamw import clip_scale, eps_of
from tinsmithd.trainer.compute.packed import Sink
from tinsmithd.trainer.engines.deepspeed.gradients import PendingGradients

NORM_PIECE = 65_536
"""Elements whose squares are summed in one float32 sum."""


class ZeroSlice(ABC):
    """One rank's slice of values and moments, float32; `step` is called on all ranks alike.

    Attributes:
        parameters: What is trained, sorted by name.
        step_count: Steps made.
        adds_while_computing: Whether gradients are added to the pending ones one by one, while they
            are made, so that a computation that fails half-way has an effect.
    """

    adds_while_computing = False
    parameters: list[Any]
    step_count: int
    _own: Tensor
    _adamw: torch.optim.AdamW

    @property
    @abstractmethod
    def _is_slice(self) -> bool:
        """Whether other ranks hold the rest of it."""

    @abstractmethod
    def _reduce(self, gradients: Tensor) -> Tensor:
        """This rank's slice of the sum over the ranks of `step`'s gradients."""

    @abstractmethod
    def _publish(self) -> None:
        """Let the model compute with the new values."""

    def step(self, gradients: Tensor, adam: AdamParams) -> float:
        """Sum gradients over the ranks, clip and apply them.

        Args:
            gradients: float32 `(padded_count,)`, this rank's; overwritten.
            adam: Settings of this step.

        Returns:
            The global L2 norm before clipping. Where it is not finite nothing was applied.
        """
        own = self._reduce(gradients)
        norm = self._norm(own)
        if not math.isfinite(norm):
            return norm
        if (scale := clip_scale(norm, adam)) < 1:
            own.mul_(scale)
        (group,) = self._adamw.param_groups
        group["lr"] = adam.learning_rate
        group["betas"] = (adam.beta1, adam.beta2)
        group["eps"] = eps_of(adam)
        group["weight_decay"] = adam.weight_decay
        self._own.grad = own.to(self._own.device)
        self._adamw.step()
        self._own.grad = None
        self.step_count += 1
        failpoints.hit("mid_optim")
        self._publish()
        return norm

    def _norm(self, own: Tensor) -> float:
        # Of pieces, then of their norms: one float32 sum over millions of squares would be off by
        # a tenth of a percent.
        norm = torch.stack(torch._foreach_norm(torch.split(own, NORM_PIECE))).double().norm()
        if self._is_slice:
            norm = norm.square()
            dist.all_reduce(norm)
            norm = norm.sqrt()
        return float(norm)

    @contextlib.contextmanager
    def collecting(self, pending: PendingGradients) -> Iterator[Sink | None]:
        """What takes gradients in while they are made; None where they come all at once."""
        yield None

    def _own_moments(self) -> list[Tensor]:
        state = self._adamw.state.get(self._own, {})
        return [state[kind] for kind in MOMENTS if kind in state]

    def _set_moments(self, moments: Sequence[Tensor], step_count: int) -> None:
        """Go on with these moments, which are copied, or with none."""
        self.step_count = step_count
        self._adamw.state.clear()
        if moments:
            kept = zip(MOMENTS, moments, strict=True)
            state = {kind: moment.to(self._own.device, copy=True) for kind, moment in kept}
            step = torch.tensor(float(step_count), device=self._own.device)
            self._adamw.state[self._own] = {"step": step, **state}
