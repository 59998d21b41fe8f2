"""What an adapter adds to the rows of an expert does not depend on how many there are."""

import pytest
import torch
from torch import Tensor

from tinsmithd.sampler.engines.transformers.model.experts import add_lora


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_an_expert_has_the_same_bits_beside_any_others(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Even where a library's product depends on it as much as it can."""
    plain = torch.mm

    def by_count(x: Tensor, weight: Tensor) -> Tensor:
        return plain(x, weight) * len(x)

    monkeypatch.setattr(torch, "mm", by_count)
    dice = torch.Generator().manual_seed(0)
    x, y, a, b = (
        torch.randn(size, generator=dice).to(dtype)
        for size in ((70, 32), (70, 24), (32, 4), (4, 24))
    )
    alone = []
    for row in range(70):
        own = y.clone()
        add_lora(own, x, torch.tensor([row]), a, b, 2.0)
        alone.append(own[row])
        assert torch.equal(own[:row], y[:row])
        assert torch.equal(own[row + 1 :], y[row + 1 :])
    for count in (2, 5, 16, 17, 40, 70):
        found = y.clone()
        add_lora(found, x, torch.arange(count), a, b, 2.0)
        assert torch.equal(found[:count], torch.stack(alone[:count]))
        assert torch.equal(found[count:], y[count:])
