"""Logits of a bfloat16 model: both forms of the head sum in float32."""

import pytest
import torch

from tinsmithd.sampler.engines.transformers.model.head import Head

ROWS, VOCAB, HIDDEN = 64, 4096, 576


@pytest.mark.parametrize("form", ["compute", "compute_few"])
def test_sums_of_bfloat16_factors_are_not_rounded_below_float32(form: str) -> None:
    """As if they were computed in float64; products of the same process are so afterwards, too."""
    dice = torch.Generator().manual_seed(0)
    weight = (torch.randint(-200, 201, (VOCAB, HIDDEN), generator=dice) / 2048).bfloat16()
    hidden = torch.randn((ROWS, HIDDEN), generator=dice).bfloat16()
    compute = getattr(Head(weight), form)
    if compute is None:
        pytest.skip("this machine has one form")
    exact = hidden.double() @ weight.double().t()
    assert (compute(hidden).double() - exact).abs().max() < 2e-5
    fine = torch.randn((ROWS, HIDDEN), generator=dice)
    other = torch.nn.functional.linear(fine, weight.float()).double()
    assert (other - fine.double() @ weight.double().t()).abs().max() < 2e-5
