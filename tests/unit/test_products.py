"""Products with fixed weights: their forms, and how many rows they are found to be alike for."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from tinsmithd.sampler.engines.transformers.model.head import Head
from tinsmithd.sampler.engines.transformers.model.invariance import (
    alike,
    cancelling_site,
    equal_sizes,
    rows_alone,
    rows_beside,
    sizes_alone,
)
from tinsmithd.sampler.engines.transformers.model.linear import BLOCK_ROWS, Window
from tinsmithd.sampler.engines.transformers.model.site_lora import SiteLora

torch.set_num_threads(1)
COUNTS = (4, 8, 12, 16, 20, 24, 64)


def test_numbers_of_rows_that_change_bits_are_noticed() -> None:
    def steady(x: Tensor) -> Tensor:
        return x * 3

    def by_count(x: Tensor) -> Tensor:
        return x * (3 if 8 <= len(x) < 24 else 3 + 1e-6)

    def by_place(x: Tensor) -> Tensor:
        return (
            x * torch.cat((torch.full((16,), 3.0), torch.full((len(x),), 3 + 1e-6)))[: len(x), None]
        )

    row = torch.ones((1, 8))
    assert alike(steady, row, COUNTS) == Window(4, 64)
    assert alike(by_count, row, COUNTS) == Window(8, 20)
    assert alike(by_place, row, COUNTS) == Window(4, 16)
    assert equal_sizes(steady, row, (16, 20, 64)) == (16, 20, 64)
    assert equal_sizes(by_count, row, (16, 20, 64)) == (16, 20)
    assert equal_sizes(by_count, row, (4, 8, 24)) == (4, 24)
    assert equal_sizes(by_place, row, (24, 32)) == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_whose_bits_depend_on_rows_are_noticed(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Alone and beside others, be it in the product of A or in that of B."""
    site, rows = cancelling_site(32, (32, 16), 16, torch.empty(0, dtype=dtype))
    assert rows_alone(site, rows, COUNTS) == Window(4, 64)
    assert rows_beside(site, rows) == Window(4, 64)
    for name in ("down", "up"):
        compute = getattr(SiteLora, name)

        def other(
            self: SiteLora, x: Tensor, *rest: Tensor, compute: Callable[..., Tensor] = compute
        ) -> Tensor:
            made = compute(self, x, *rest)
            return made if len(x) <= 24 else made + 1

        with monkeypatch.context() as patch:
            patch.setattr(SiteLora, name, other)
            assert rows_alone(site, rows, COUNTS) == Window(4, 24)
            assert rows_beside(site, rows) == Window(4, 24)
            assert sizes_alone(site, rows, (8, 24, 64)) == (8, 24)
            assert sizes_alone(site, rows, (64, 128)) == (64, 128)


def test_an_adapter_that_has_other_bits_beside_others_stays_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    site, rows = cancelling_site(32, (32, 16), 16, torch.empty(0))
    beside = SiteLora.beside

    def otherwise(sites: Sequence[SiteLora | None]) -> SiteLora | None:
        made = beside(sites)
        assert made is not None
        made._scaling = 1 + 2**-20
        return made

    monkeypatch.setattr(SiteLora, "beside", otherwise)
    assert rows_beside(site, rows).most < BLOCK_ROWS


def test_draws_and_scores_have_the_same_logits_up_to_the_order_of_sums() -> None:
    """In bfloat16 draws read the weight in another type, which must have the same values."""
    dice = torch.Generator().manual_seed(0)
    weight = torch.randn((300, 64), generator=dice).bfloat16()
    hidden = torch.randn((20, 64), generator=dice).bfloat16()
    head = Head(weight)
    assert head.compute_few is not None
    expected = hidden.double() @ weight.double().t()
    for compute in (head.compute, head.compute_few):
        torch.testing.assert_close(compute(hidden).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("value", [1e-8, 1e5, 1.00390625e-6])
def test_a_head_that_float16_cannot_hold_has_one_form(value: float) -> None:
    """Too small, too large, or with more digits than are left where numbers are that small."""
    weight = torch.ones((32, 8), dtype=torch.bfloat16)
    assert Head(weight).compute_few is not None
    weight[3, 4] = value
    assert float(weight[3, 4]) != float(weight[3, 4].half())
    assert Head(weight).compute_few is None
