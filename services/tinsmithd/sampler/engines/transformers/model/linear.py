"""Products with fixed weights: fast at few rows, and the same for a row whatever stands beside it.

A row of `x W^T` is a sum that a library may order otherwise for other numbers of rows. On the CPUs
that were measured it does so at a single row (oneDNN), or at what a number of rows leaves when
divided by 4 (MKL), so products have a multiple of `ROWS_STEP`. `invariance` checks that at start.
Where that is not enough, every product is made of blocks of `BLOCK_ROWS` rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_STEP = 4
"""Products have a multiple of it as rows. 4 cost what one costs: reading the weight costs most."""

BLOCK_ROWS = 16
"""Rows of each product where the bits of a row depend on how many there are."""

REORDERED_FOR_ROWS = 16
"""Rows for which oneDNN chooses the order of a weight."""

Compute = Callable[[Tensor], Tensor]


class RowRule:
    """How many rows the products of a decoder have.

    Attributes:
        in_blocks: Products are made of blocks of `BLOCK_ROWS` rows, instead of any multiple of
            `ROWS_STEP`. It is decided before anything that counts is computed.
    """

    def __init__(self) -> None:
        self.in_blocks = False

    def padded(self, count: int) -> int:
        """The rows of a product of which `count` are wanted."""
        step = BLOCK_ROWS if self.in_blocks else ROWS_STEP
        return -(-count // step) * step


class Product:
    """`x W^T + b` of a weight that never changes, in the fastest form there is.

    Where that is not the weight as it is, the weight is not kept.

    Args:
        weight: `(d_out, d_in)`.
        bias: `(d_out,)`.
        rule: How many rows are given.

    Attributes:
        d_out, d_in: The weight's sizes.
        compute: The product whatever the rule says.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rule: RowRule) -> None:
        self.d_out, self.d_in = weight.shape
        self._rule = rule
        can = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
        self.compute = _reordered(weight, bias) if can else _plain(weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        """Map `(T, d_in)` to a new `(T, d_out)`, T as the rule gives it."""
        if not self._rule.in_blocks:
            return self.compute(x)
        return torch.cat([self.compute(rows) for rows in x.split(BLOCK_ROWS)])


def _plain(weight: Tensor, bias: Tensor | None) -> Compute:
    return lambda x: F.linear(x, weight, bias)


def _reordered(weight: Tensor, bias: Tensor | None) -> Compute:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, REORDERED_FOR_ROWS)
    compute: Any = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: compute(x, packed, bias, "none", [], "")


def add_low_rank(
    rule: RowRule, y: Tensor, x: Tensor, a: Tensor, all_b: Sequence[Tensor], scaling: float
) -> None:
    """Add `s x A B` to y in place, for parts of y side by side, each with its own A and B.

    Args:
        rule: How many rows products have.
        y: `(T, d_out)`, T as the rule says.
        x: `(T, d_in)`.
        a: The A of all parts side by side, `(d_in, parts * rank)`.
        all_b: The B of each part, `(rank, d_out of the part)`.
        scaling: s.
    """
    if rule.in_blocks and len(y) > BLOCK_ROWS:
        for rows_y, rows_x in zip(y.split(BLOCK_ROWS), x.split(BLOCK_ROWS), strict=True):
            add_low_rank(rule, rows_y, rows_x, a, all_b, scaling)
        return
    update = torch.mm(x, a)
    if len(all_b) == 1:
        y.addmm_(update, all_b[0], alpha=scaling)
        return
    sizes = [b.shape[1] for b in all_b]
    updates = update.split(len(all_b[0]), 1)
    for part, own, b in zip(y.split(sizes, 1), updates, all_b, strict=True):
        part.addmm_(own, b, alpha=scaling)
