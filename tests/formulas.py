"""The built-in losses as plain formulas in float64, written apart from the code under test."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

Inputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Formula:
    """One loss: `loss(lp, at, inputs)`; what the method holds constant is taken at `at`."""

    inputs: tuple[str, ...]
    loss: Callable[[np.ndarray, np.ndarray, Inputs], float]
    config: Mapping[str, float] = field(default_factory=dict)


RL = ("logprobs", "advantages")


def cross_entropy(lp: np.ndarray, at: np.ndarray, x: Inputs) -> float:
    return float(-(lp * x["weights"]).sum())


def importance_sampling(lp: np.ndarray, at: np.ndarray, x: Inputs) -> float:
    return float(-(np.exp(lp - x["logprobs"]) * x["advantages"]).sum())


def _clipped(ratio: np.ndarray, advantages: np.ndarray, low: float, high: float) -> float:
    return float(-np.minimum(ratio * advantages, np.clip(ratio, low, high) * advantages).sum())


def ppo(low: float, high: float) -> Callable[[np.ndarray, np.ndarray, Inputs], float]:
    return lambda lp, at, x: _clipped(np.exp(lp - x["logprobs"]), x["advantages"], low, high)


def cispo(low: float, high: float) -> Callable[[np.ndarray, np.ndarray, Inputs], float]:
    def loss(lp: np.ndarray, at: np.ndarray, x: Inputs) -> float:
        constant = np.clip(np.exp(at - x["logprobs"]), low, high)
        return float(-(constant * lp * x["advantages"]).sum())

    return loss


def dro(beta: float) -> Callable[[np.ndarray, np.ndarray, Inputs], float]:
    def loss(lp: np.ndarray, at: np.ndarray, x: Inputs) -> float:
        distance = lp - x["logprobs"]
        return float(-(lp * x["advantages"] - beta / 2 * distance**2).sum())

    return loss


def gspo(low: float, high: float) -> Callable[[np.ndarray, np.ndarray, Inputs], float]:
    def loss(lp: np.ndarray, at: np.ndarray, x: Inputs) -> float:
        mask = x["sequence_ratio_mask"] != 0
        sequence = np.exp((at - x["logprobs"])[mask].mean()) if mask.any() else 1.0
        return _clipped(sequence * np.exp(lp - at), x["advantages"], low, high)

    return loss


def bounds(low: float, high: float) -> dict[str, float]:
    return {"clip_low_threshold": low, "clip_high_threshold": high}


FORMULAS: Mapping[str, Formula] = {
    "cross_entropy": Formula(("weights",), cross_entropy),
    "importance_sampling": Formula(RL, importance_sampling),
    "ppo": Formula(RL, ppo(0.8, 1.2)),
    "ppo:wide": Formula(RL, ppo(0.5, 3.0), bounds(0.5, 3.0)),
    "cispo": Formula(RL, cispo(0.0, 4.0)),
    "cispo:narrow": Formula(RL, cispo(0.8, 1.2), bounds(0.8, 1.2)),
    "dro": Formula(RL, dro(0.05)),
    "dro:strong": Formula(RL, dro(0.7), {"beta": 0.7}),
    "gspo": Formula((*RL, "sequence_ratio_mask"), gspo(1 - 3e-4, 1 + 4e-4)),
    "gspo:wide": Formula((*RL, "sequence_ratio_mask"), gspo(0.5, 2.0), bounds(0.5, 2.0)),
}
"""By name of the loss, with a word for its settings; without one they are the defaults."""


def make_inputs(lp: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Inputs whose ratios lie on both sides of the thresholds, float64, shaped like `lp`."""
    rng = np.random.default_rng(seed)
    return {
        "weights": rng.normal(size=lp.shape),
        "logprobs": lp + rng.normal(scale=0.6, size=lp.shape),
        "advantages": rng.normal(size=lp.shape),
        "sequence_ratio_mask": (rng.random(lp.shape) < 0.7).astype(float),
    }
