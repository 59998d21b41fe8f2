"""Random data for engines, as domain values."""

from collections.abc import Mapping, Sequence

import numpy as np

from tinsmith import tensors
from tinsmith.v1 import types_pb2 as pb
from tinsmithd.domain import CrossEntropy, Datum, LossFn
from tinsmithd.trainer.engines.interface import Batch, TrainingEngine

VOCAB_SIZE = 256


def make_data(seed: int, count: int, *, targets: int | None = None) -> list[Datum]:
    """Cross-entropy data of different lengths; with `targets`, so many per position."""
    rng = np.random.default_rng(seed)
    data = []
    for _ in range(count):
        length = int(rng.integers(4, 14))
        shape = (length,) if targets is None else (length, targets)
        inputs = {
            "target_tokens": rng.integers(0, VOCAB_SIZE, shape),
            "weights": rng.normal(size=shape).astype(np.float32),
        }
        data.append(Datum(rng.integers(0, VOCAB_SIZE, length), inputs))
    return data


def begin_alike(seed: int, data: Sequence[Datum], count: int) -> list[Datum]:
    """Each datum after `count` tokens that are the same for all; its targets and other inputs at
    them are its own."""
    rng = np.random.default_rng(seed + 2000)
    first = rng.integers(0, VOCAB_SIZE, count)

    def longer(datum: Datum) -> Datum:
        inputs = {}
        for name, own in datum.loss_fn_inputs.items():
            shape = (count, *own.shape[1:])
            is_target = name == "target_tokens"
            more = rng.integers(0, VOCAB_SIZE, shape) if is_target else rng.normal(size=shape)
            inputs[name] = np.concatenate([more.astype(own.dtype), own])
        return Datum(np.concatenate([first, datum.tokens]), inputs)

    return [longer(datum) for datum in data]


def make_rl_data(seed: int, data: Sequence[Datum], logprobs: Sequence[np.ndarray]) -> list[Datum]:
    """The same tokens with given sampling logprobs and random advantages."""
    rng = np.random.default_rng(seed + 1000)
    return [
        Datum(
            datum.tokens,
            {
                "target_tokens": datum.loss_fn_inputs["target_tokens"],
                "logprobs": own,
                "advantages": rng.normal(size=own.shape).astype(np.float32),
            },
        )
        for datum, own in zip(data, logprobs, strict=True)
    ]


def datum_to_pb(datum: Datum) -> pb.Datum:
    """A datum as a message, packed."""
    chunk = pb.ModelInputChunk(tokens=tensors.encode(datum.tokens))
    inputs = {name: tensors.encode(array) for name, array in datum.loss_fn_inputs.items()}
    return pb.Datum(model_input=pb.ModelInput(chunks=[chunk]), loss_fn_inputs=inputs)


def collect(
    engine: TrainingEngine,
    model_id: str,
    data: Sequence[Datum],
    loss_fn: LossFn | None = None,
    *,
    backward: bool,
) -> tuple[Mapping[str, float], list[np.ndarray]]:
    """Metrics of a call, and the logprobs of each datum."""
    logprobs: list[np.ndarray] = []
    batch = Batch(model_id, data, loss_fn or CrossEntropy(), backward=backward)
    result = engine.forward(batch, lambda _, output: logprobs.append(output["logprobs"]))
    return result.metrics, logprobs
