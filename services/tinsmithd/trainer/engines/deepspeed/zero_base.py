"""ZeRO stage 3 for a frozen base: each rank holds a share, hooks gather what a layer needs.

A rank reads nothing but its share from the files, so no rank ever has the whole model. After its
layer a gathered weight is dropped, unless it is within a budget: frozen weights never go stale, so
those within the budget are gathered once and stay.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus

from tinsmithd.modeling.base import Keep
from tinsmithd.modeling.stored_weights import StoredWeights
from tinsmithd.trainer.engines.deepspeed.zero_adapter import ZeroConfig

_KEPT = -1
"""Number of a layer that always needs the weight; DeepSpeed numbers its own from 0."""


def init_deepspeed() -> None:
    """Let DeepSpeed use the process group that there is."""
    backend = dist.get_backend()
    if backend == "gloo":
        # DeepSpeed would compile an op for this; plain gloo does as well, without a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def share(zero: ZeroConfig) -> Keep:
    """A rank keeps its share of each weight; every rank loads the same model at the same time."""

    def keep(model: Any, stored: StoredWeights) -> None:
        _Cut(zero, model, stored)

    return keep


class _Cut(deepspeed.zero.Init):  # type: ignore[misc]
    """Cuts a model whose weights are in files; DeepSpeed's own cuts one that rank 0 has whole."""

    def __init__(self, zero: ZeroConfig, model: Any, stored: StoredWeights) -> None:
        init_deepspeed()
        self._stored = stored
        super().__init__(module=model, config_dict_or_path=_config(zero), dtype=model.dtype)
        del self._stored  # DeepSpeed keeps this object as long as the model

    def _convert_to_zero_parameters(self, param_list: Iterable[torch.nn.Parameter]) -> None:
        cut = {id(whole): self._cut(name, whole) for name, whole in self.module.named_parameters()}
        for module in self.module.modules():
            for name, whole in list(module.named_parameters(recurse=False)):
                setattr(module, name, cut[id(whole)])

    def _cut(self, name: str, whole: torch.nn.Parameter) -> Any:
        """This rank's share of a parameter on the meta device."""
        element = torch.empty(1, dtype=whole.dtype, device=self.local_device)
        parameter: Any = torch.nn.Parameter(element.expand(whole.shape), requires_grad=False)
        self._convert_to_deepspeed_param(parameter)
        count = -(-parameter.ds_numel // self.dp_world_size)
        own: Any = torch.empty(count, dtype=whole.dtype, device=self.remote_device)
        start = self.rank * count
        values, padding = own.tensor_split([max(0, parameter.ds_numel - start)])
        self._stored.keep(name, start, values)
        padding.zero_()
        # As DeepSpeed leaves them when it has cut a parameter.
        own.ds_numel, own.status, own.final_location = count, PartitionedParamStatus.AVAILABLE, None
        parameter.ds_tensor = own
        parameter.ds_numel_aligned = count * self.dp_world_size
        parameter.partition()
        return parameter


@contextlib.contextmanager
def without_weights(model: Any) -> Iterator[None]:
    """Let a model of which each rank has its `share` compute before `start`, without a gather.

    Its weights are zeros, which all have the memory of the largest.
    """
    parameters = list(model.parameters())
    count = max(parameter.ds_numel for parameter in parameters)
    zeros = parameters[0].data.new_zeros(count)
    for parameter in parameters:
        parameter.data = zeros[: parameter.ds_numel].view(parameter.ds_shape)
    yield
    for parameter in parameters:
        parameter.data = zeros.new_empty(0)


def start(model: Any, zero: ZeroConfig) -> Any:
    """Let a model compute of which each rank has its `share`; only afterwards PEFT may wrap it.

    Returns:
        DeepSpeed's engine.
    """
    engine, *_ = deepspeed.initialize(model=model, config=_config(zero), dist_init_required=False)
    _keep(model, zero.gathered_bytes_max)
    return engine


def _config(zero: ZeroConfig) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        # DeepSpeed would gather a router with its experts as one, and look for shares of whatever
        # is inside. It does so for experts that are modules, of which ranks pass through different
        # ones; here they are one module, which every forward passes through.
        "leaf_module": {"classes": []},
    }
    if zero.offload:
        settings["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": None,
        "zero_optimization": settings,
    }


def _keep(model: Any, bytes_max: int) -> None:
    """Keep as many weights as the budget holds, small ones first: each spares a collective.

    DeepSpeed keeps its own persistent parameters only if a pass repeats the one before exactly,
    which calls of different models and kinds do not. It never drops a weight that a layer uses, so
    this function claims such a use.
    """
    for parameter in sorted(model.parameters(), key=lambda p: p.ds_numel):
        bytes_max -= parameter.ds_numel * parameter.element_size()
        if bytes_max < 0:
            return
        parameter.ds_active_sub_modules.add(_KEPT)
