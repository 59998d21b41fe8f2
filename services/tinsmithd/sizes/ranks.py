"""Bytes that one rank holds, by ZeRO stage, as `trainer.engines.deepspeed` lays models out.

Values, moments and gradients are float32. A base that is not trained has the dtype of the setting.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tinsmithd.sizes.architecture import BYTES_OF_DTYPE, Architecture
from tinsmithd.sizes.weights import Shapes, adapter_weights, base_weights, element_count
from tinsmithd.tunings import LoraConfig, Tuning

_FLOAT = 4
_ALIGNMENT = 2
"""DeepSpeed pads the flat values to a multiple of this for each rank."""

TRAINED_DTYPE = "float32"
"""As `trainer.engines.factory` has it: of all weights that are trained."""


@dataclass(frozen=True)
class RankBytes:
    """What one rank holds.

    Attributes:
        base: Its part of the frozen base.
        values: What it holds of the trained values, that the model computes with.
        optimizer: Its slice of the values that the optimizer has, if it has its own, and moments.
        gradients: Pending gradients, while there are any.
        offloaded: How much of all these is in host memory instead of on the device.
        gathered: Most of a partitioned base that is whole at once, for the module that computes.
        call: What a call adds: its gradients before they are added, and the copies with which it
            can be taken back, the one of a call of several batches included.

    While a base is loaded, a rank has no more than what it keeps: it reads nothing else.
    """

    base: int
    values: int
    optimizer: int
    gradients: int
    offloaded: int
    gathered: int
    call: int

    @property
    def kept(self) -> int:
        """All that it holds between two calls, on the device and in host memory."""
        return self.base + self.values + self.optimizer + self.gradients

    @property
    def on_device(self) -> int:
        """The part of it on the device."""
        return self.kept - self.offloaded


def rank_bytes(
    model: Architecture, tuning: Tuning, *, dtype: str, stage: int, ranks: int, offload: bool
) -> RankBytes:
    """What one rank holds with one model.

    Args:
        model: The base model.
        tuning: What is trained.
        dtype: Of the frozen base; trained weights are float32.
        stage: ZeRO stage.
        ranks: Number of ranks.
        offload: The setting `trainer.offload`.
    """
    base = base_weights(model)
    element = BYTES_OF_DTYPE[dtype if tuning.is_adapter else TRAINED_DTYPE]
    gathered = _largest_module(base) * element if stage == 3 else 0
    if isinstance(tuning, LoraConfig):
        adapter = _flat(adapter_weights(model, tuning), stage, ranks, offload)
        of_base = (_share(base, ranks) if stage == 3 else element_count(base)) * element
        offloaded = adapter.offloaded + (of_base if offload and stage == 3 else 0)
        return RankBytes(
            of_base,
            adapter.values,
            adapter.optimizer,
            adapter.gradients,
            offloaded,
            gathered,
            adapter.call,
        )
    if stage == 3:
        return _partitioned(base, ranks, offload, gathered)
    flat = _flat(base, stage, ranks, offload)
    return RankBytes(0, flat.values, flat.optimizer, flat.gradients, flat.offloaded, 0, flat.call)


def away_bytes(model: Architecture, lora: LoraConfig, ranks: int, stage: int) -> int:
    """Host memory that a model takes of each rank while it has no place on the device."""
    count = element_count(adapter_weights(model, lora))
    moments = 2 * count // (ranks if stage else 1)
    return _FLOAT * (2 * count + moments)  # values and pending gradients are whole


@dataclass(frozen=True)
class _Flat:
    values: int
    optimizer: int
    gradients: int
    offloaded: int
    call: int


def _flat(shapes: Shapes, stage: int, ranks: int, offload: bool) -> _Flat:
    """One flat parameter with its optimizer (`zero_adapter`)."""
    count = element_count(shapes)
    if stage == 0:
        padded, optimizer = count, 2 * count
    else:
        step = _ALIGNMENT * ranks
        padded = -(-count // step) * step
        optimizer = 3 * padded // ranks
    optimizer *= _FLOAT
    return _Flat(
        values=padded * _FLOAT,
        optimizer=optimizer,
        gradients=padded * _FLOAT,
        offloaded=optimizer if offload and stage else 0,
        call=(count + 2 * padded) * _FLOAT,
    )


def _partitioned(base: Shapes, ranks: int, offload: bool, gathered: int) -> RankBytes:
    """All weights in shares (`zero_partitioned`), of which DeepSpeed keeps a copy."""
    share = _share(base, ranks) * _FLOAT
    # While the largest gradient is handed over there are also a padded copy, this rank's share of
    # it, the head's, and what autograd still holds of the experts before: weights and a gradient.
    largest = max(math.prod(shape) for shape in base.values()) * _FLOAT
    experts = [s for name, s in base.items() if ".mlp.experts." in name]
    of_experts = _largest_module({n: s for n, s in base.items() if ".mlp.experts." in n})
    of_experts += max(map(math.prod, experts), default=0)
    return RankBytes(
        base=0,
        values=share,
        optimizer=3 * share,
        gradients=share,
        offloaded=4 * share if offload else 0,
        gathered=gathered,
        call=3 * largest + largest // ranks + of_experts * _FLOAT + 2 * share,
    )


def _share(shapes: Shapes, ranks: int) -> int:
    """Elements of a rank's shares; each weight is padded by itself."""
    return sum(-(-math.prod(shape) // ranks) for shape in shapes.values())


def _largest_module(shapes: Shapes) -> int:
    """Elements of the module with the most weights of its own: they are gathered together."""
    modules: dict[str, int] = {}
    for name, shape in shapes.items():
        module = name.rpartition(".")[0]
        modules[module] = modules.get(module, 0) + math.prod(shape)
    return max(modules.values(), default=0)


def by_stage(
    model: Architecture, tuning: Tuning, *, dtype: str, ranks: int
) -> Mapping[int, RankBytes]:
    """What a rank holds in each stage, without offloading."""
    return {
        stage: rank_bytes(model, tuning, dtype=dtype, stage=stage, ranks=ranks, offload=False)
        for stage in range(4)
    }
