"""One rank of `test_sizes`: counts the bytes of what the DeepSpeed engine really holds.

Arguments: model folder, folder for the results (`<case>.<rank>.json`), names of cases.
"""

import gc
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data import collect, make_data
from engines import leave_together, make_engine
from tinsmithd.domain import AdamParams, FullConfig, LoraConfig
from tinsmithd.state import files as state_files
from tinsmithd.trainer.engines.deepspeed.gradients import PendingGradients
from tinsmithd.trainer.process_group import distributed

LORA = LoraConfig(rank=8)
CASES: Mapping[str, Mapping[str, Any]] = {
    "lora-0": {"tuning": LORA, "zero_stage": 0, "dtype": "bfloat16"},
    "lora-1": {"tuning": LORA, "zero_stage": 1, "dtype": "bfloat16"},
    "lora-2-offload": {"tuning": LORA, "zero_stage": 2, "offload": True, "dtype": "bfloat16"},
    "lora-3": {"tuning": LORA, "zero_stage": 3, "dtype": "bfloat16"},
    "lora-3-offload": {"tuning": LORA, "zero_stage": 3, "offload": True, "dtype": "bfloat16"},
    **{f"full-{stage}": {"tuning": FullConfig(), "zero_stage": stage} for stage in range(4)},
}


def held() -> dict[int, int]:
    """Bytes of all tensors with memory behind them, by the address of their storage."""
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type != "meta":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


class Watch:
    """Sees the most that is held while gradients are handed over, and the most that is gathered."""

    def __init__(self) -> None:
        self.at_once = self.gathered = self.largest = 0
        add, scatter = PendingGradients.add, dist.reduce_scatter_tensor

        def watched_add(*arguments: Any) -> None:
            add(*arguments)
            self._look()

        def watched_scatter(own: Any, gradient: Any) -> Any:
            if gradient.numel() >= self.largest:  # with smaller ones there is less
                self.largest = gradient.numel()
                self._look()
            return scatter(own, gradient)

        self.patches = ((PendingGradients, "add", watched_add, add),)
        self.patches += ((dist, "reduce_scatter_tensor", watched_scatter, scatter),)

    def _look(self) -> None:
        self.at_once = max(self.at_once, sum(held().values()))

    def on(self, model: torch.nn.Module) -> None:
        """Begin, and look at what is gathered whenever a module has computed."""
        parameters = [p for p in model.parameters() if hasattr(p, "ds_numel")]

        def look(*_: Any) -> None:
            whole = [p for p in parameters if p.numel() == p.ds_numel]
            self.gathered = max(self.gathered, sum(p.numel() * p.element_size() for p in whole))

        for place, name, replacement, _ in self.patches:
            setattr(place, name, replacement)
        for module in model.modules():
            module.register_forward_hook(look, prepend=True)

    def off(self) -> None:
        """End."""
        for place, name, _, original in self.patches:
            setattr(place, name, original)


def measure(folder: str, tuning: Any, **settings: Any) -> dict[str, Any]:
    """Train a little and count."""
    gc.collect()
    before = held().keys()
    engine = make_engine("deepspeed", folder, **settings)
    engine.create_model("m", tuning)
    inner = engine.engine
    loaded = sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in _base(inner))
    collect(engine, "m", make_data(0, 2), backward=True)
    engine.optim_step("m", AdamParams())
    collect(engine, "m", make_data(1, 2), backward=True)
    if tuning == FullConfig():
        inner._release()
    gc.collect()
    kept = sum(size for at, size in held().items() if at not in before)
    others = sum(size for at, size in held().items() if at in before)
    watch = Watch()
    watch.on(inner._base.model)
    engine.savepoint("m")  # as a call of several batches has it
    collect(engine, "m", make_data(2, 2), backward=True)
    watch.off()
    state = engine.export_state("m", optimizer=True)
    files: dict[str, int] = {}
    for name, piece in state_files.to_pieces(state, 1 << 20):
        files[name] = files.get(name, 0) + len(piece)
    inner.close()
    return {
        "kept": kept,
        "call": watch.at_once - others - kept,
        "gathered": watch.gathered,
        "parameters": loaded,
        "files": files,
    }


def _base(engine: Any) -> list[Any]:
    return [p for name, p in engine._base.model.named_parameters() if "lora_" not in name]


def main() -> None:
    folder, out, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    rank, _ = distributed.rank_and_world_size()
    for case in cases:
        found = measure(folder, **CASES[case])
        Path(out, f"{case}.{rank}.json").write_text(json.dumps(found))
    leave_together(rank)


if __name__ == "__main__":
    main()
