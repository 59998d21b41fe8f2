"""One adapter's values and AdamW state, in a DeepSpeed engine.

DeepSpeed sees one flat parameter. It lays the parameter out over the ranks and holds this rank's
slice of values and moments (ZeRO stages 1 and up; whole with stage 0; in host memory with
`offload`); the adapter's parameters are views of its buffer. A step hands the pending gradients,
which DeepSpeed does not know (ADR 0001), to that slice directly: DeepSpeed's backward hooks would
copy and scan them some ten times (ADR 0003).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tinsmithd.domain import MOMENTS
from tinsmithd.modeling.device_copies import prepare_host_memory
from tinsmithd.trainer.engines.deepspeed import sums, whole_states
from tinsmithd.trainer.engines.deepspeed.gradients import Layout
from tinsmithd.trainer.engines.deepspeed.zero_slice import ZeroSlice


@dataclass(frozen=True)
class ZeroConfig:
    """How models are spread over the ranks.

    Attributes:
        stage: ZeRO stage, 0 to 3. Stages 1 and up partition optimizer states; 3 also partitions
            the base model.
        offload: Keep optimizer states and, with stage 3, the base in host memory.
        gathered_bytes_max: With stage 3, bytes of the base's weights that each rank keeps whole
            once they were gathered. They are frozen, so they never go stale.
        in_order: Add up what ranks have in their order, see `sums`.
    """

    stage: int = 1
    offload: bool = False
    gathered_bytes_max: int = 0
    in_order: bool = False


class _Flat(torch.nn.Module):
    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.flat = torch.nn.Parameter(values)


class ZeroAdapter(ZeroSlice):
    """Steps one adapter, or a whole model that each rank holds.

    Every method is called on all ranks alike, but for `copy_state` and `restore`.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], config: ZeroConfig) -> None:
        self.layout = Layout(parameters)
        self.parameters = list(parameters.values())
        self.step_count = 0
        self._in_order = config.in_order
        self._world_size, self._rank = dist.get_world_size(), dist.get_rank()
        module = _Flat(torch.cat([p.detach().reshape(-1) for p in self.parameters]))
        self._adamw = torch.optim.AdamW(module.parameters(), lr=0.0, fused=True)
        self._engine: Any = _initialize(module, self._adamw, config)
        if config.stage == 0:
            self._whole: Tensor = module.flat.data
            self._slices = [self._whole]
            self._own = module.flat
        else:
            zero = self._engine.optimizer
            if config.offload:
                _drop_backward_buffers(zero)
            self._whole = zero.bit16_groups_flat[0]
            self._slices = zero.parallel_partitioned_bit16_groups[0]
            self._own = zero.single_partition_of_fp32_groups[0]
        for parameter, view in zip(self.parameters, self.layout.views(self._whole), strict=True):
            parameter.data = view

    @property
    def padded_count(self) -> int:
        """Elements of a flat buffer for gradients: padded so that slices are equal."""
        return self._whole.numel()

    @property
    def _is_slice(self) -> bool:
        return len(self._slices) > 1

    def _reduce(self, gradients: Tensor) -> Tensor:
        """This rank's slice of the sum over the ranks."""
        if self._world_size == 1:
            return gradients
        if len(self._slices) == 1:
            sums.all_reduce(gradients, in_order=self._in_order)
            return gradients
        return sums.reduce_scatter(gradients, in_order=self._in_order)

    def _publish(self) -> None:
        mine = self._slices[self._own_index]
        if mine.data_ptr() != self._own.data_ptr():
            mine.copy_(self._own.detach())
        if self._is_slice:
            dist.all_gather(list(self._slices), mine.clone())

    # --- state in and out ---------------------------------------------------------------------

    def values(self) -> dict[str, np.ndarray]:
        """A copy of all values, by name; none but on the first rank."""
        return self._named(whole_states.of_first(self._kept_values()))

    def moments(self) -> dict[str, np.ndarray]:
        """A copy of all moments, as `<kind>.<name>`; none before the first step, nor but on the
        first rank."""
        found: dict[str, np.ndarray] = {}
        for kind, own in zip(MOMENTS, self._own_moments(), strict=False):
            if self._is_slice:
                whole = whole_states.of_all(own, self._whole.device)
            else:
                whole = whole_states.of_first(own[: self.layout.count])
            found.update({f"{kind}.{name}": a for name, a in self._named(whole).items()})
        return found

    def prepare_copies(self) -> None:
        """See `ZeroSlice`: those of a snapshot, and of a save meanwhile."""
        if self._rank == 0:
            prepare_host_memory(self.layout.count, 2 + len(MOMENTS))

    def _named(self, whole: Tensor | None) -> dict[str, np.ndarray]:
        return {} if whole is None else self.layout.by_name(whole)

    def _kept_values(self) -> Tensor:
        return self._whole[: self.layout.count]

    def _put_values(self, kept: Tensor) -> None:
        self._kept_values().copy_(kept)
        self._own.copy_(self._slices[self._own_index])

    def _kept_part(self, values: Mapping[str, np.ndarray]) -> Tensor:
        return self.layout.flatten(values)

    def _own_part(self, arrays: Mapping[str, np.ndarray]) -> Tensor:
        padded = torch.zeros(self.padded_count)
        padded[: self.layout.count] = self.layout.flatten(arrays)
        return padded.chunk(len(self._slices))[self._own_index]

    @property
    def _own_index(self) -> int:
        return self._rank if self._is_slice else 0

    def close(self) -> None:
        """Free what DeepSpeed holds; the adapter keeps its values."""
        for parameter in self.parameters:
            parameter.data = parameter.data.clone()
        self._engine.destroy()
        self._engine = None


def _initialize(module: torch.nn.Module, optimizer: Any, config: ZeroConfig) -> Any:
    zero: dict[str, Any] = {"stage": min(config.stage, 2)}
    if config.offload and config.stage:
        zero["offload_optimizer"] = {"device": "cpu"}
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # it would be compiled; torch's is fused too
        "steps_per_print": None,
        "zero_optimization": zero,
    }
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=settings, dist_init_required=False
    )
    return engine


def _drop_backward_buffers(zero: Any) -> None:
    """Free what DeepSpeed's own backward pass over offloaded states would need: nobody runs it.

    Beside slices in host memory, it is a buffer of all values on the device and another here.
    """
    zero.temp_grad_buffer_for_gpu_offload = zero.temp_grad_buffer_for_cpu_offload = None
    zero.param_buffer_of_bit16_for_cpu_offload_groups.clear()
    for gradients in zero.offload_gradient_dict.values():
        gradients.clear()
