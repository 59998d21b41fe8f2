"""ZeRO stage 3 for a frozen base: each rank holds a share, hooks gather what a layer needs.

After its layer a gathered weight is dropped, unless it is within a budget: frozen weights never go
stale, so those within the budget are gathered once and stay.
"""

from typing import Any

import deepspeed

from tinsmithd.trainer.engines.deepspeed.zero_adapter import ZeroConfig

_KEPT = -1
"""Number of a layer that always needs the weight; DeepSpeed numbers its own from 0."""


def partition(model: Any, zero: ZeroConfig) -> Any:
    """Leave each rank its share of the frozen weights; PEFT may wrap the model only afterwards.

    Returns:
        DeepSpeed's engine.
    """
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
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": None,
        "zero_optimization": settings,
    }
    engine, *_ = deepspeed.initialize(model=model, config=config, dist_init_required=False)
    _keep(model, zero.gathered_bytes_max)
    return engine


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
