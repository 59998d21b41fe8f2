"""All weights of a model under ZeRO stage 3: each rank holds a share of values, gradients, moments.

DeepSpeed partitions the weights and gathers what a layer needs, forward and backward (`zero_base`).
As soon as autograd has a gradient, the ranks sum it and each keeps its share in the model's buffer
of pending gradients, as for adapters. So a call that fails can be taken back, and any number of
calls may come before a step (ADR 0001, ADR 0004).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tinsmithd.domain import MOMENTS
from tinsmithd.trainer.compute.packed import Sink
from tinsmithd.trainer.engines.deepspeed import sums, whole_states
from tinsmithd.trainer.engines.deepspeed.gradients import Layout, PendingGradients
from tinsmithd.trainer.engines.deepspeed.zero_slice import ZeroSlice


def is_partitioned(parameter: torch.nn.Parameter) -> bool:
    """Whether DeepSpeed gave each rank a share of a parameter."""
    return hasattr(parameter, "ds_tensor")


class ZeroPartitioned(ZeroSlice):
    """Holds one rank's share; every method is called on all ranks alike.

    A share is `ceil(n / world size)` elements of each parameter of n, the last ones padding.

    Args:
        parameters: By name, sorted, partitioned.
        release: Makes DeepSpeed drop every weight that is gathered.
        in_order: Add up what ranks have in their order, see `sums`.
    """

    adds_while_computing = True

    def __init__(
        self, parameters: Mapping[str, Any], release: Callable[[], None], *, in_order: bool
    ) -> None:
        shapes = {name: torch.empty(p.ds_shape, device="meta") for name, p in parameters.items()}
        self.layout = Layout(shapes)
        self.parameters: list[Any] = list(parameters.values())  # with what DeepSpeed gave them
        self.step_count = 0
        self._release, self._in_order = release, in_order
        self._world_size, self._rank = dist.get_world_size(), dist.get_rank()
        self._counts = [p.ds_tensor.numel() for p in self.parameters]
        shares = [p.ds_tensor.detach().reshape(-1).float() for p in self.parameters]
        self._own = torch.nn.Parameter(torch.cat(shares))
        self._places = {id(parameter): i for i, parameter in enumerate(self.parameters)}
        self._adamw = torch.optim.AdamW([self._own], lr=0.0, fused=True)
        for parameter, share in zip(self.parameters, self._shares(self._own.data), strict=True):
            if parameter.ds_tensor.dtype == torch.float32:
                parameter.ds_tensor.data = share  # one copy for the model and the optimizer

    @property
    def padded_count(self) -> int:
        """Elements of a flat buffer for gradients: this rank's shares."""
        return self._own.numel()

    @property
    def _is_slice(self) -> bool:
        return self._world_size > 1

    def _shares(self, flat: Tensor) -> list[Tensor]:
        return list(torch.split(flat, self._counts))

    @contextlib.contextmanager
    def collecting(self, pending: PendingGradients) -> Iterator[Sink]:
        """Gradients made inside go to `pending`, summed over the ranks."""

        def take(parameter: Tensor, gradient: Tensor) -> None:
            flat = pending.buffer(self.padded_count, gradient.device)
            self._shares(flat)[self._places[id(parameter)]].add_(self._share_of_sum(gradient))

        def take_from(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient, parameter.grad = parameter.grad, None
            take(parameter, gradient)

        hooks = [p.register_post_accumulate_grad_hook(take_from) for p in self.parameters]
        try:
            yield take
        finally:
            for hook in hooks:
                hook.remove()
            for parameter in self.parameters:
                parameter.grad = None

    def _share_of_sum(self, gradient: Tensor) -> Tensor:
        flat = gradient.detach().reshape(-1).float()
        if self._world_size == 1:
            return flat
        count = -(-flat.numel() // self._world_size)
        padded = torch.nn.functional.pad(flat, (0, count * self._world_size - flat.numel()))
        return sums.reduce_scatter(padded, in_order=self._in_order)

    def _reduce(self, gradients: Tensor) -> Tensor:
        return gradients  # `collecting` summed them

    def _publish(self) -> None:
        self._release()  # gathered copies are stale now
        for parameter, share in zip(self.parameters, self._shares(self._own.data), strict=True):
            if parameter.ds_tensor.data_ptr() != share.data_ptr():
                parameter.ds_tensor.data.copy_(share)

    # --- state in and out ---------------------------------------------------------------------

    def values(self) -> dict[str, np.ndarray]:
        """All values, by name, gathered from the ranks; none but on the first."""
        return self._whole(self._own.data)

    def moments(self) -> dict[str, np.ndarray]:
        """All moments, as `<kind>.<name>`, gathered from the ranks; none before the first step, nor
        but on the first rank."""
        return {
            f"{kind}.{name}": array
            for kind, own in zip(MOMENTS, self._own_moments(), strict=False)
            for name, array in self._whole(own).items()
        }

    def prepare_copies(self) -> None:
        """See `ZeroSlice`: nothing here, where each parameter's copy has a size of its own."""

    def _whole(self, own: Tensor) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for name, shape, share in zip(
            self.layout.names, self.layout.shapes, self._shares(own), strict=True
        ):
            whole = whole_states.of_all(share, share.device)
            if whole is not None:
                found[name] = whole[: shape.numel()].view(shape).numpy()
        return found

    def _kept_values(self) -> Tensor:
        return self._own.detach()

    def _put_values(self, kept: Tensor) -> None:
        self._own.copy_(kept)
        self._publish()

    def _kept_part(self, values: Mapping[str, np.ndarray]) -> Tensor:
        return self._own_part(values)

    def _own_part(self, arrays: Mapping[str, np.ndarray]) -> Tensor:
        part = torch.zeros(self.padded_count)
        for name, share in zip(self.layout.names, self._shares(part), strict=True):
            flat = np.asarray(arrays[name], np.float32).reshape(-1)
            mine = flat[self._rank * share.numel() : (self._rank + 1) * share.numel()]
            share[: len(mine)] = torch.from_numpy(mine.copy())
        return part

    def close(self) -> None:
        """Do nothing: DeepSpeed's partition is that of the base."""
