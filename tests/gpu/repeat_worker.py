"""One rank of `test_repeat_gpu`: some calls and steps in bfloat16 with kernels that keep one order.

Arguments: model folder, folder for results, name of this run, and the name of an earlier one whose
compositions it follows, or "". `<name>.npz` has what came of it, `<name>.json` the compositions.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from engines import leave_together, make_engine
from tinsmithd.domain import AdamParams, CrossEntropy, Datum, LoraConfig
from tinsmithd.trainer.engines.interface import Batch

LENGTHS = ((300, 40, 700), (1, 512), (900, 5, 5, 64, 250), (1500,))
"""Tokens of the data of each call: some longer than a block of attention kernels has."""
MICRO_BATCH_TOKENS = 1024


def data_of(index: int) -> list[Datum]:
    rng = np.random.default_rng(index)
    data = []
    for length in LENGTHS[index]:
        inputs = {
            "target_tokens": rng.integers(0, 256, length),
            "weights": rng.normal(size=length).astype(np.float32),
        }
        data.append(Datum(rng.integers(0, 256, length), inputs))
    return data


def main() -> None:
    folder, out, name, earlier = sys.argv[1:]
    given = json.loads(Path(out, f"{earlier}.json").read_text()) if earlier else []
    engine = make_engine(
        "deepspeed",
        folder,
        dtype="bfloat16",
        deterministic="always",
        micro_batch_tokens_max=MICRO_BATCH_TOKENS,
    )
    assert engine.engine.identity["deterministic"] == "True"
    engine.create_model("m", LoraConfig(rank=8, seed=7))
    found: dict[str, np.ndarray] = {}
    compositions = []
    for index in range(len(LENGTHS)):
        logprobs: list[np.ndarray] = []
        composition = given[index].encode() if given else b""
        batch = Batch("m", data_of(index), CrossEntropy(), backward=True, composition=composition)
        result = engine.forward(batch, lambda _, o, to=logprobs: to.append(o["logprobs"]))
        found[f"logprobs {index}"] = np.concatenate(logprobs)
        found[f"loss {index}"] = np.array(result.metrics["loss:sum"])
        compositions.append(result.composition.decode())
        step = engine.optim_step("m", AdamParams(learning_rate=1e-3))
        found[f"norm {index}"] = np.array(step["grad_norm:last"])
    state = engine.export_state("m", optimizer=True)
    if dist.get_rank() == 0:
        found |= {f"weight {key}": array for key, array in state.weights.items()}
        found |= {f"moment {key}": array for key, array in state.optimizer.items()}
        np.savez(Path(out, f"{name}.npz"), **found)
        Path(out, f"{name}.json").write_text(json.dumps(compositions))
    torch.cuda.synchronize()
    leave_together(dist.get_rank())


if __name__ == "__main__":
    main()
