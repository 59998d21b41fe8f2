"""One rank of `test_spread`: one long datum, which all ranks compute together.

Arguments: model folder, folder for the results (`<case>.npz` of rank 0, `<case>.<rank>.json` with
the bytes that a rank keeps for the way back), names of cases.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data import collect
from engines import leave_together, make_engine
from tinsmithd.domain import AdamParams, CrossEntropy, Datum, LoraConfig
from tinsmithd.loss_fns import Gspo
from tinsmithd.trainer.engines.deepspeed import batch_run
from tinsmithd.trainer.engines.interface import Batch
from tinsmithd.trainer.process_group import distributed

TOKENS = 4096
LORA = LoraConfig(rank=4, seed=7)
ADAM = AdamParams(learning_rate=1e-2, eps=0.1)


@dataclass(frozen=True)
class Case:
    """A stage, and a length that need not be a multiple of the ranks."""

    zero_stage: int
    tokens: int = TOKENS


CASES: Mapping[str, Case] = {"long": Case(1), "stage-3": Case(3, 300), "odd": Case(0, 301)}


def datum(tokens: int, seed: int) -> Datum:
    """One that cross-entropy and GSPO can read."""
    rng = np.random.default_rng(seed)
    inputs = {
        "target_tokens": rng.integers(0, 256, tokens),
        "weights": rng.normal(size=tokens).astype(np.float32),
        "logprobs": rng.normal(-5, 1, tokens).astype(np.float32),
        "advantages": rng.normal(size=tokens).astype(np.float32),
        "sequence_ratio_mask": (rng.random(tokens) < 0.5).astype(np.float32),
    }
    return Datum(rng.integers(0, 256, tokens), inputs)


class Kept:
    """Counts what autograd saves in each micro-batch, parameters apart.

    Attributes:
        largest: Most bytes of one micro-batch.
    """

    def __init__(self, parameters: Any) -> None:
        self.largest = 0
        self._not_counted = {p.untyped_storage().data_ptr() for p in parameters}
        self._compute = batch_run.compute_packed

    def __enter__(self) -> "Kept":
        batch_run.compute_packed = self._counted
        return self

    def __exit__(self, *_: object) -> None:
        batch_run.compute_packed = self._compute

    def _counted(self, *arguments: Any, **named: Any) -> Any:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._not_counted:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # it stays until the way back, so its address stays its own

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found = self._compute(*arguments, **named)
        self.largest = max(self.largest, sum(sizes.values()))
        return found


def gradients(engine: Any) -> np.ndarray:
    """Pending gradients, summed over the ranks."""
    found = engine.engine._models.get("m").pending.copy()
    dist.all_reduce(found)
    return found.numpy()


def train(folder: str, case: Case, ranks: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Two steps, and a forward without a way back in between."""
    engine = make_engine(
        "deepspeed",
        folder,
        zero_stage=case.zero_stage,
        sequence_parallel=ranks,
        micro_batch_tokens_max=256,
        activation_bytes_max=1 << 40,
    )
    engine.create_model("m", LORA)
    results: dict[str, np.ndarray] = {}
    composition = ""
    with Kept(engine.engine._base.model.parameters()) as kept:
        for step in range(2):
            data = [datum(case.tokens, step)]
            batch = Batch("m", data, Gspo() if step else CrossEntropy(), backward=True)
            logprobs: list[np.ndarray] = []
            found = engine.forward(batch, lambda _, out, to=logprobs: to.append(out["logprobs"]))
            composition = found.composition.decode()
            results[f"{step} loss"] = np.array(found.metrics["loss:sum"])
            results[f"{step} logprobs"] = logprobs[0]
            results[f"{step} gradients"] = gradients(engine)[: adapter_count(engine)]
            results[f"{step} norm"] = np.array(engine.optim_step("m", ADAM)["grad_norm:last"])
    if case.tokens < TOKENS:
        metrics, _ = collect(engine, "m", [datum(case.tokens, 5)], backward=False)
        results["loss without gradients"] = np.array(metrics["loss:sum"])
    for name, array in engine.export_state("m", optimizer=False).weights.items():
        results[f"weight {name}"] = array
    return results, {"kept": kept.largest, "composition": json.loads(composition)}


def adapter_count(engine: Any) -> int:
    """Elements of the adapter; flat buffers are padded by the number of ranks."""
    count: int = engine.engine._models.get("m").slot.zero.layout.count
    return count


def main() -> None:
    folder, out, *names = sys.argv[1:]
    torch.set_num_threads(1)
    rank, world_size = distributed.rank_and_world_size()
    for name in names:
        results, found = train(folder, CASES[name], world_size)
        Path(out, f"{name}.{rank}.json").write_text(json.dumps(found))
        if rank == 0:
            np.savez(Path(out, f"{name}.npz"), **results)
    leave_together(rank)


if __name__ == "__main__":
    main()
