"""Each built-in loss against its formula in float64 and against finite differences."""

import numpy as np
import pytest
import torch

from formulas import FORMULAS, make_inputs
from tinsmithd.loss_fns import LOSSES, Cispo, Gspo, ImportanceSampling, LossFn, Ppo
from tinsmithd.trainer.compute.losses import loss_sum

COUNT = 12
STEP = 1e-6


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", FORMULAS)
def test_loss_and_gradient_agree_with_the_formula(case: str, seed: int) -> None:
    """Value to 1e-12, gradient to 1e-6 of central differences, in float64."""
    formula = FORMULAS[case]
    loss_fn = LOSSES[case.split(":")[0]](**formula.config)
    lp = -np.random.default_rng(seed).uniform(0.1, 4, COUNT)
    inputs = make_inputs(lp, seed + 10)
    leaf = torch.from_numpy(lp).requires_grad_()
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    value = loss_sum(loss_fn, leaf, tensors)
    (gradient,) = torch.autograd.grad(value, leaf)
    assert float(value.detach()) == pytest.approx(formula.loss(lp, lp, inputs), abs=1e-12)
    for i in range(COUNT):
        up, down = lp.copy(), lp.copy()
        up[i] += STEP
        down[i] -= STEP
        slope = formula.loss(up, lp, inputs) - formula.loss(down, lp, inputs)
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


def test_every_loss_of_the_contract_has_a_formula() -> None:
    """A loss that is added must be added there."""
    assert {case.split(":")[0] for case in FORMULAS} == set(LOSSES)
