"""Attention of a segment in its context on a CPU, part by part, without a mask and without a copy.

A segment's queries see all keys of each segment above, and of their own those up to themselves. So
each part is an operation that a kernel does as it is: all of it, or causal. What the parts find is
joined by the logarithms of their sums,

    o = sum_i exp(l_i - l) o_i,    l = log sum_i exp(l_i),

and a kernel that goes back through one part needs `o` and `l` of the whole, and nothing of the
others (Liu et al. 2023, "Ring Attention", section 3). Joined keys and a mask would be kept for the
way back in each layer: of a long prompt that is more than all else that its rollouts keep.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
DTYPES = (torch.float32, torch.bfloat16)
KEYS_MIN = 256
"""Keys above from which on this is faster than joined keys and a mask, which keep some percent of
what a token keeps below that."""

Part = tuple[Tensor, Tensor]
"""Keys and values of a segment above, each `(1, kv_heads, S, D)`."""


def serves(query: Tensor, above: Sequence[Part]) -> bool:
    """Whether it computes where these are and in their dtype, and pays."""
    here = query.device.type == "cpu" and query.dtype in DTYPES
    return here and sum(key.shape[2] for key, _ in above) >= KEYS_MIN


def attend(
    query: Tensor, key: Tensor, value: Tensor, above: Sequence[Part], scaling: float | None
) -> Tensor:
    """Attention of some segments of one length that have the same context.

    Args:
        query: `(count, heads, L, D)`.
        key: `(count, kv_heads, L, D)`.
        value: As `key`.
        above: The segments above, in any order.
        scaling: Factor on the scores; None is `D ** -0.5`.

    Returns:
        `(count, L, heads, D)`.
    """
    apply: Any = _InContext.apply
    found: Tensor = apply(scaling, query, key, value, *(each for part in above for each in part))
    return found.transpose(1, 2)


class _InContext(torch.autograd.Function):
    """Arguments after the scaling: queries, own keys and values, then those of each part above."""

    @staticmethod
    def forward(ctx: Any, scaling: float | None, *tensors: Tensor) -> Tensor:
        query, key, value, *above = tensors
        found, whole = _forward(query, key, value, 0.0, True, scale=scaling)
        rows = _rows(query, key.shape[1])
        for keys, values in zip(above[::2], above[1::2], strict=True):
            out, log = _forward(rows, keys, values, 0.0, False, scale=scaling)
            log = _unrow(log[..., None], query)[..., 0]
            both = torch.logaddexp(whole, log)
            found *= _share(whole, both, found.dtype)
            found.addcmul_(_unrow(out, query), _share(log, both, found.dtype))
            whole = both
        ctx.save_for_backward(*tensors, found, whole)
        ctx.scaling = scaling
        joined: Tensor = found
        return joined

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]  # torch has it for any
        *tensors, joined, whole = ctx.saved_tensors
        query, key, value, *above = tensors
        grad = grad.contiguous()
        d_query, *found = _backward(
            *(grad, query, key, value, joined, whole, 0.0, True), scale=ctx.scaling
        )
        rows, d_rows, o_rows = (_rows(x, key.shape[1]) for x in (query, grad, joined))
        log_rows = _rows(whole[..., None], key.shape[1])[..., 0]
        for keys, values in zip(above[::2], above[1::2], strict=True):
            d_part, *d_above = _backward(
                *(d_rows, rows, keys, values, o_rows, log_rows, 0.0, False), scale=ctx.scaling
            )
            d_query += _unrow(d_part, query)
            found += d_above
        return None, d_query, *found


def _share(log: Tensor, whole: Tensor, dtype: torch.dtype) -> Tensor:
    """What a part contributes to the whole: `(count, heads, L, 1)`."""
    return (log - whole).exp_()[..., None].to(dtype)


def _rows(x: Tensor, kv_heads: int) -> Tensor:
    """What `count` segments have for each query head as rows of their key head: `(count, heads, L,
    D)` to `(1, kv_heads, count * groups * L, D)`."""
    rows: Tensor = x.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 3)
    return rows[None]


def _unrow(rows: Tensor, like: Tensor) -> Tensor:
    """The other way: `(1, kv_heads, count * groups * L, E)` to `(count, heads, L, E)`."""
    count, heads, length, _ = like.shape
    cut: Tensor = rows[0].unflatten(1, (count, heads // rows.shape[1], length))
    return cut.transpose(0, 1).flatten(1, 2)
