"""Random data for engines, as domain values."""

from collections.abc import Mapping, Sequence

import numpy as np

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


def make_rl_data(seed: int, count: int, logprobs: Sequence[np.ndarray]) -> list[Datum]:
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
        for datum, own in zip(make_data(seed, count), logprobs, strict=True)
    ]


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
