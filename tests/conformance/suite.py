"""What the suites of training engines share."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from data import collect
from engines import make_engine
from tinsmithd.domain import AdamParams, Datum, LoraConfig
from tinsmithd.trainer.engines.interface import TrainingEngine

ENGINES = ("reference", "deepspeed")
LORA = LoraConfig(rank=4, seed=7)
ADAM = AdamParams(learning_rate=1e-2, eps=0.1)

torch.set_num_threads(1)


def new_engine(name: str, folder: Path) -> TrainingEngine:
    return make_engine(name, str(folder), dtype="float32", zero_stage=1, on_progress=lambda _: None)


def weights_of(engine: TrainingEngine, model_id: str) -> Mapping[str, np.ndarray]:
    return engine.export_state(model_id, optimizer=False).weights


def difference(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


def train(
    engine: TrainingEngine,
    model_id: str,
    batches: Sequence[Sequence[Datum]],
    adam: AdamParams = ADAM,
) -> list[float]:
    """One step per two batches; returns the losses."""
    losses = []
    for index, batch in enumerate(batches):
        metrics, _ = collect(engine, model_id, batch, backward=True)
        losses.append(metrics["loss:sum"])
        if index % 2:
            engine.optim_step(model_id, adam)
    return losses
