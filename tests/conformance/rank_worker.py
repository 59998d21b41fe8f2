"""One rank of `test_two_ranks`: runs a fixed script on the DeepSpeed engine, rank 0 saves it.

Arguments: model folder, ZeRO stage, file for the results (.npz).
"""

import sys

import numpy as np
import torch

from data import collect, make_data
from tinsmithd.domain import AdamParams, LoraConfig
from tinsmithd.trainer.engines import distributed
from tinsmithd.trainer.engines.factory import make_engine
from tinsmithd.trainer.engines.interface import TrainingEngine

MODELS = {"m": LoraConfig(rank=4, seed=7), "n": LoraConfig(rank=2, seed=8, train_mlp=False)}
COUNTS = (3, 1, 2, 5)
ADAM = AdamParams(learning_rate=1e-2, eps=0.1, grad_clip_norm=80.0)


def script(engine: TrainingEngine) -> dict[str, np.ndarray]:
    """Two models interleaved, uneven data, fewer data than ranks, a save and a load."""
    results: dict[str, np.ndarray] = {}
    for model_id, lora in MODELS.items():
        engine.create_model(model_id, lora)
    for index, count in enumerate(COUNTS):
        for model_id in MODELS:
            metrics, logprobs = collect(engine, model_id, make_data(index, count), backward=True)
            results[f"{model_id} loss {index}"] = np.array(metrics["loss:sum"])
            results[f"{model_id} logprobs {index}"] = np.concatenate(logprobs)
            if index % 2:
                step = engine.optim_step(model_id, ADAM)
                results[f"{model_id} norm {index}"] = np.array(step["grad_norm:last"])
        if index == 1:
            state = engine.export_state("m", optimizer=True)
            engine.delete_model("m")
            engine.create_model("m", state.lora)
            engine.import_state("m", state, optimizer=True)
    for model_id in MODELS:
        for name, array in engine.export_state(model_id, optimizer=True).weights.items():
            results[f"{model_id} weight {name}"] = array
    return results


def main() -> None:
    folder, zero_stage, out = sys.argv[1:]
    torch.set_num_threads(1)
    engine = make_engine(
        "deepspeed",
        folder,
        dtype="float32",
        zero_stage=int(zero_stage),
        on_progress=lambda _: None,
    )
    results = script(engine)
    rank, _ = distributed.rank_and_world_size()
    command = distributed.broadcast_bytes(b"end" if rank == 0 else None)
    assert command == b"end"
    assert distributed.broadcast_bytes(b"" if rank == 0 else None) == b""
    if rank == 0:
        np.savez(out, **results)
    distributed.close()


if __name__ == "__main__":
    main()
