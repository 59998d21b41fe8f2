"""Each built-in loss against its formula in float64 and against finite differences."""

import numpy as np
import pytest
import torch

from tinsmithd.domain import (
    LOSSES,
    Cispo,
    CrossEntropy,
    Dro,
    Gspo,
    ImportanceSampling,
    LossFn,
    Ppo,
)
from tinsmithd.trainer.engines.losses import loss_sum

COUNT = 12
STEP = 1e-6

CASES: list[LossFn] = [
    CrossEntropy(),
    ImportanceSampling(),
    Ppo(),
    Ppo(clip_low_threshold=0.5, clip_high_threshold=3.0),
    Cispo(),
    Cispo(clip_low_threshold=0.8, clip_high_threshold=1.2),
    Dro(),
    Dro(beta=0.7),
    Gspo(),
    Gspo(clip_low_threshold=0.5, clip_high_threshold=2.0),
]


def make_inputs(seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logprobs and inputs whose ratios lie on both sides of the thresholds."""
    rng = np.random.default_rng(seed)
    lp = -rng.uniform(0.1, 4, COUNT)
    return lp, {
        "weights": rng.normal(size=COUNT),
        "logprobs": lp + rng.normal(scale=0.6, size=COUNT),
        "advantages": rng.normal(size=COUNT),
        "sequence_ratio_mask": (rng.random(COUNT) < 0.7).astype(float),
    }


def formula(loss: LossFn, lp: np.ndarray, at: np.ndarray, x: dict[str, np.ndarray]) -> float:
    """The loss at `lp`; what the method holds constant is taken at `at`."""
    advantages, q = x["advantages"], x["logprobs"]
    ratio = np.exp(lp - q)
    match loss:
        case CrossEntropy():
            return float(-(lp * x["weights"]).sum())
        case ImportanceSampling():
            return float(-(ratio * advantages).sum())
        case Ppo(clip_low_threshold=low, clip_high_threshold=high):
            clipped = np.clip(ratio, low, high)
            return float(-np.minimum(ratio * advantages, clipped * advantages).sum())
        case Cispo(clip_low_threshold=low, clip_high_threshold=high):
            return float(-(np.clip(np.exp(at - q), low, high) * lp * advantages).sum())
        case Dro(beta=beta):
            return float(-(lp * advantages - beta / 2 * (lp - q) ** 2).sum())
        case Gspo(clip_low_threshold=low, clip_high_threshold=high):
            mask = x["sequence_ratio_mask"] != 0
            sequence = np.exp((at - q)[mask].mean())
            token = sequence * np.exp(lp - at)
            clipped = np.clip(token, low, high)
            return float(-np.minimum(token * advantages, clipped * advantages).sum())
    raise AssertionError(loss)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loss", CASES, ids=str)
def test_loss_and_gradient_agree_with_the_formula(loss: LossFn, seed: int) -> None:
    """Value to 1e-12, gradient to 1e-6 of central differences, in float64."""
    lp, inputs = make_inputs(seed)
    leaf = torch.from_numpy(lp).requires_grad_()
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    value = loss_sum(loss, leaf, tensors)
    (gradient,) = torch.autograd.grad(value, leaf)
    assert float(value.detach()) == pytest.approx(formula(loss, lp, lp, inputs), abs=1e-12)
    for i in range(COUNT):
        up, down = lp.copy(), lp.copy()
        up[i] += STEP
        down[i] -= STEP
        slope = formula(loss, up, lp, inputs) - formula(loss, down, lp, inputs)
        assert float(gradient[i]) == pytest.approx(slope / (2 * STEP), abs=1e-6), i


@pytest.mark.parametrize("loss", [ImportanceSampling(), Ppo(), Cispo(), Gspo()], ids=str)
def test_extreme_ratios_give_no_nan(loss: LossFn) -> None:
    """A ratio that float32 cannot hold, with advantage 0, contributes nothing."""
    lp = torch.tensor([-1.0, -1.0], requires_grad=True)
    inputs = {
        "logprobs": torch.tensor([-1000.0, -1.0]),
        "advantages": torch.tensor([0.0, 1.0]),
        "sequence_ratio_mask": torch.ones(2),
    }
    value = loss_sum(loss, lp, inputs)
    (gradient,) = torch.autograd.grad(value, lp)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()


def test_a_datum_without_masked_tokens_has_sequence_ratio_one() -> None:
    """An all-zero mask must not divide by zero."""
    lp = torch.tensor([-1.0, -2.0])
    inputs = {
        "logprobs": torch.tensor([-3.0, -3.0]),
        "advantages": torch.tensor([1.0, 2.0]),
        "sequence_ratio_mask": torch.zeros(2),
    }
    assert float(loss_sum(Gspo(), lp, inputs)) == pytest.approx(-3.0)


def test_every_loss_of_the_contract_is_covered() -> None:
    """A loss that is added must be added here."""
    assert {type(case) for case in CASES} == set(LOSSES.values())
