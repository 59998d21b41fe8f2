"""The process of `test_memory`: trains with and without enough memory, and says what came out.

Arguments: model folder; `enough`, `short` or `long`. Prints `found` and one JSON value.
Each is a process of its own, since freed memory stays with a process.
"""

import json
import logging
import resource
import sys
from pathlib import Path

import numpy as np
import torch

from data import collect
from engines import make_engine
from tinsmithd.domain import AdamParams, CrossEntropy, Datum, LoraConfig
from tinsmithd.errors import TinsmithError
from tinsmithd.trainer.engines.interface import TrainingEngine
from tinsmithd.trainer.process_group import distributed

MIB = 1024 * 1024
ROOM = {"enough": -1, "short": 48 * MIB, "long": 24 * MIB}
COUNT, LENGTH = 40, 500
TOO_LONG = 20_000
AGAIN = "the same call again"


def datum(length: int, seed: int) -> Datum:
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=length).astype(np.float32)
    targets = rng.integers(0, 256, length)
    return Datum(rng.integers(0, 256, length), {"target_tokens": targets, "weights": weights})


def limit_memory(room: int) -> None:
    """Let this process take so many bytes more than it has; -1 lifts the limit."""
    now = resource.RLIM_INFINITY
    if room >= 0:
        torch.zeros(1)  # what is loaded lazily should be there
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        now = pages * resource.getpagesize() + room
    resource.setrlimit(resource.RLIMIT_AS, (now, resource.RLIM_INFINITY))


def train(engine: TrainingEngine, room: int) -> tuple[float, list[float]]:
    """One step after two calls; returns the loss of one, and the weights after the step."""
    data = [datum(LENGTH, seed) for seed in range(COUNT)]
    limit_memory(room)
    metrics, _ = collect(engine, "m", data, backward=True)
    logging.warning(AGAIN)
    assert collect(engine, "m", data, backward=True)[0].keys() == metrics.keys()
    limit_memory(-1)
    engine.optim_step("m", AdamParams(learning_rate=1e-2, eps=0.1))
    weights = engine.export_state("m", optimizer=False).weights
    return metrics["loss:sum"], np.concatenate([w.ravel() for w in weights.values()]).tolist()


def too_long(engine: TrainingEngine, room: int) -> tuple[str, str, list[float]]:
    """A datum that does not fit at all after one that waits; returns the error and two norms."""
    adam = AdamParams(learning_rate=0.0)
    collect(engine, "m", [datum(8, 1)], backward=True)
    norms = [engine.optim_step("m", adam)["grad_norm:last"]]
    collect(engine, "m", [datum(8, 1)], backward=True)
    limit_memory(room)
    error = ("", "")
    try:
        collect(engine, "m", [datum(8, 1), datum(TOO_LONG, 2)], CrossEntropy(), backward=True)
    except TinsmithError as refusal:
        error = (str(refusal.reason), refusal.message)
    limit_memory(-1)
    norms.append(engine.optim_step("m", adam)["grad_norm:last"])
    return (*error, norms)


def main() -> None:
    folder, case = sys.argv[1:]
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING)
    engine = make_engine(
        "deepspeed",
        folder,
        dtype="float32",
        zero_stage=0,
        micro_batch_tokens_max=10**6,
        activation_bytes_max=10**12,
        on_progress=lambda _: None,
    )
    engine.create_model("m", LoraConfig(rank=4, seed=7))
    collect(engine, "m", [datum(8, 99)], backward=True)  # loads what is loaded lazily
    engine.optim_step("m", AdamParams(learning_rate=0.0))
    # One write, so that lines of two ranks do not mix.
    sys.stdout.write(
        "found " + json.dumps((too_long if case == "long" else train)(engine, ROOM[case])) + "\n"
    )
    sys.stdout.flush()
    distributed.close()


if __name__ == "__main__":
    main()
