"""Logits in float32, whatever dtype a model's weights have: one function for trainer and Sampler.

A logit that was rounded to bfloat16 is off by up to one part in 256, which a softmax turns into
tenths of a nat. If trainer and Sampler rounded in different places, they would disagree. So nothing
rounds the sums of hidden states times weight, and an adapter adds to them in float32 as well.
"""

from typing import Any

import torch
from torch import Tensor

BLOCK_ROWS = 2048
"""Rows of a weight that a CPU widens at once: 2048 x 576 float32 fit into its cache."""


def float_logits(
    hidden: Tensor,
    weight: Tensor,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """`h W^T + s (h A^T) B^T` in float32; it builds no graph.

    Args:
        hidden: `(T, d)`, of the weight's dtype.
        weight: `(V, d)`.
        lora_a: float32 `(r, d)`, or None where the head has no adapter.
        lora_b: float32 `(V, r)`, likewise.
        scaling: alpha / rank.
        out: float32 `(T, V)` to write to.

    Returns:
        float32 `(T, V)`.
    """
    with torch.no_grad():
        logits = float_product(hidden, weight, out=out)
        if lora_a is not None and lora_b is not None:
            update = hidden.to(lora_a.dtype) @ lora_a.t()
            logits.addmm_(update, lora_b.t(), alpha=scaling)
    return logits


def float_product(hidden: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`h W^T` with sums that are never rounded below float32; it builds no graph.

    Args:
        hidden: `(T, d)`.
        weight: `(V, d)`, of the same dtype.
        out: float32 `(T, V)` to write to.

    Returns:
        float32 `(T, V)`.
    """
    if out is None:
        shape = (len(hidden), len(weight))
        out = torch.empty(shape, dtype=torch.float32, device=hidden.device)
    if weight.dtype == torch.float32:
        return torch.mm(hidden, weight.t(), out=out)
    if weight.device.type != "cpu":
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=out)
    # A CPU has no kernel for narrow factors and a wide sum. A bfloat16 is a float32 whose lower
    # half is zero, so widening loses nothing.
    wide = hidden.float()
    block = torch.empty(min(BLOCK_ROWS, len(weight)), weight.shape[1])
    for start in range(0, len(weight), BLOCK_ROWS):
        rows = weight[start : start + BLOCK_ROWS]
        torch.mm(wide, block[: len(rows)].copy_(rows).t(), out=out[:, start : start + len(rows)])
    return out


def differentiable_product(hidden: Tensor, weight: Tensor) -> Tensor:
    """`float_product` as part of a graph; a weight narrower than float32 gets no gradient."""
    if weight.dtype == torch.float32:
        return torch.nn.functional.linear(hidden, weight)
    apply: Any = _Product.apply
    product: Tensor = apply(hidden, weight)
    return product


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return float_product(hidden, weight)

    @staticmethod
    def backward(  # type: ignore[override]  # torch types it for any number of gradients
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grad.to(weight.dtype) @ weight, None
