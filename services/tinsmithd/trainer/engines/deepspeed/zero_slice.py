"""AdamW on this rank's slice of a model's weights: the same for each way in which ZeRO cuts it."""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinsmithd import failpoints
from tinsmithd.domain import MOMENTS, AdamParams
from tinsmithd.modeling.device_copies import host_copy
from tinsmithd.trainer.compute.adamw import clip_scale, eps_of
from tinsmithd.trainer.compute.packed import Sink
from tinsmithd.trainer.engines.deepspeed import sums
from tinsmithd.trainer.engines.deepspeed.gradients import Layout, PendingGradients

NORM_PIECE = 65_536
"""Maximum elements whose squares go into one float32 sum."""


@dataclass
class StateCopy:
    """A model's state as one rank holds it, in host memory.

    Attributes:
        values: float32, flat: all of them, or this rank's shares.
        moments: This rank's slices, one per name of `MOMENTS`; empty before the first step.
        step_count: Steps made.
    """

    values: Tensor
    moments: list[Tensor] = field(default_factory=list)
    step_count: int = 0


class ZeroSlice(ABC):
    """One rank's slice of values and moments, float32; `step` is called on all ranks alike.

    Attributes:
        layout: Names and shapes of the trained parameters, sorted by name.
        parameters: These parameters, in the same order.
        step_count: Number of steps made.
        adds_while_computing: Whether gradients are added to the pending ones one by one, while they
            are made, so that a computation that fails half-way has an effect.
    """

    adds_while_computing = False
    layout: Layout
    parameters: list[Any]
    step_count: int
    _in_order: bool
    _own: Tensor
    _adamw: torch.optim.AdamW

    @property
    @abstractmethod
    def padded_count(self) -> int:
        """Elements of this rank's flat buffer for gradients."""

    @abstractmethod
    def values(self) -> dict[str, np.ndarray]:
        """A copy of all values, by name; none but on the first rank."""

    @abstractmethod
    def moments(self) -> dict[str, np.ndarray]:
        """A copy of all moments, as `<kind>.<name>`; none before the first step, nor but on the
        first rank."""

    @abstractmethod
    def close(self) -> None:
        """Free what DeepSpeed holds; the parameters keep their values."""

    @abstractmethod
    def prepare_copies(self) -> None:
        """Make ready for copies of the state, which come when training must not wait for them."""

    @property
    @abstractmethod
    def _is_slice(self) -> bool:
        """Whether other ranks hold the rest of the model."""

    @abstractmethod
    def _reduce(self, gradients: Tensor) -> Tensor:
        """This rank's slice of the sum over the ranks of `step`'s gradients."""

    @abstractmethod
    def _publish(self) -> None:
        """Let the model compute with the new values."""

    @abstractmethod
    def _kept_values(self) -> Tensor:
        """The values that a copy of the state holds, flat; not a copy yet."""

    @abstractmethod
    def _put_values(self, kept: Tensor) -> None:
        """Let the model compute with values that `_kept_values` gave."""

    @abstractmethod
    def _kept_part(self, values: Mapping[str, np.ndarray]) -> Tensor:
        """What `_kept_values` gives of these values."""

    @abstractmethod
    def _own_part(self, arrays: Mapping[str, np.ndarray]) -> Tensor:
        """This rank's slice of moments of one kind."""

    def step(self, gradients: Tensor, adam: AdamParams) -> float:
        """Sum gradients over the ranks, clip and apply them.

        Args:
            gradients: float32 `(padded_count,)`, this rank's; overwritten.
            adam: Settings of this step.

        Returns:
            The global L2 norm before clipping. If it is not finite, nothing was applied.
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
        # The norm of the norms of pieces: one float32 sum over millions of squares would be off by
        # a tenth of a percent.
        norm = torch.stack(torch._foreach_norm(torch.split(own, NORM_PIECE))).double().norm()
        if self._is_slice:
            norm = norm.square()
            sums.all_reduce(norm, in_order=self._in_order)
            norm = norm.sqrt()
        return float(norm)

    @contextlib.contextmanager
    def collecting(self, pending: PendingGradients) -> Iterator[Sink | None]:
        """A sink for gradients while they are made; None where they come all at once."""
        yield None

    # --- state in and out ---------------------------------------------------------------------

    def load(
        self,
        values: Mapping[str, np.ndarray],
        moments: Mapping[str, Mapping[str, np.ndarray]] | None,
        step_count: int,
    ) -> None:
        """Begin with given values and, if any, moments as kind to name to array."""
        own = [] if moments is None else [self._own_part(moments[kind]) for kind in MOMENTS]
        self.restore(StateCopy(self._kept_part(values), own, step_count if own else 0))

    def copy_state(self) -> StateCopy:
        """Copy what this rank holds to host memory."""
        moments = [host_copy(moment) for moment in self._own_moments()]
        return StateCopy(host_copy(self._kept_values()), moments, self.step_count)

    def restore(self, copy: StateCopy) -> None:
        """Go on from a copy of this or of another model of the same shape."""
        with torch.no_grad():
            self._put_values(copy.values)
        # Copied, since the optimizer works in place and the copy may be used again.
        self._set_moments(copy.moments, copy.step_count)

    def _own_moments(self) -> list[Tensor]:
        state = self._adamw.state.get(self._own, {})
        return [state[kind] for kind in MOMENTS if kind in state]

    def _set_moments(self, moments: Sequence[Tensor], step_count: int) -> None:
        """Go on with copies of these moments, or with none."""
        self.step_count = step_count
        self._adamw.state.clear()
        if moments:
            kept = zip(MOMENTS, moments, strict=True)
            state = {kind: moment.to(self._own.device, copy=True) for kind, moment in kept}
            step = torch.tensor(float(step_count), device=self._own.device)
            self._adamw.state[self._own] = {"step": step, **state}
