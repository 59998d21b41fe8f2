"""Products with fixed weights: fast at few rows, and the same for a row whatever stands beside it.

A row of `x W^T` is a sum that a library may order otherwise for other numbers of rows. On the CPUs
that were measured it does so at a single row (oneDNN), at what a number of rows leaves when divided
by 4 (MKL), or above 32 rows (oneDNN with AMX), so products have a multiple of `ROWS_STEP`, and no
more than were found to be alike. `invariance` finds that out at start. Where not even few numbers
are alike, every product is made of blocks of `BLOCK_ROWS` rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_STEP = 4
"""Products have a multiple of it as rows. 4 cost what one costs: reading the weight costs most."""

BLOCK_ROWS = 16
"""Rows of each product where the bits of a row depend on how many there are."""

REORDERED_FOR_ROWS = 16
"""Rows for which oneDNN chooses the order of a weight."""

LINEAR: Any = torch.ops.mkldnn._linear_pointwise.default
LINEAR_PLUS: Any = torch.ops.mkldnn._linear_pointwise.binary
"""oneDNN's `x W^T + b`, and `x W^T + other`, on reordered weights."""

Compute = Callable[[Tensor], Tensor]


class Window(NamedTuple):
    """How many rows a product may have: from `least` to `most`."""

    least: int
    most: int

    def within(self, other: "Window") -> "Window":
        """What both allow."""
        return Window(max(self.least, other.least), min(self.most, other.most))


class RowRule:
    """How many rows the products of a decoder have.

    Attributes:
        step: A multiple of this.
        most: Not more than this, a multiple of `step`; None: any number.
        lora_rows: Those of an adapter, by its padded rank.
        beside_rows: Those of adapters side by side; ranks that are not here are not computed so.

    All are decided before anything that counts is computed.
    """

    def __init__(self) -> None:
        self.step = ROWS_STEP
        self.most: int | None = None
        self.lora_rows: dict[int, Window] = {}
        self.beside_rows: dict[int, Window] = {}

    def padded(self, count: int) -> int:
        """The rows of a product of which `count` are wanted."""
        return -(-count // self.step) * self.step

    def use_blocks(self) -> None:
        """Let every product be made of blocks of `BLOCK_ROWS` rows."""
        self.step = self.most = BLOCK_ROWS


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
        make = _reordered if can_reorder(weight) else _plain
        self.compute: Compute = make(weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        """Map `(T, d_in)` to a new `(T, d_out)`, T as the rule gives it."""
        return in_blocks(self.compute, x, self._rule.most)


def _plain(weight: Tensor, bias: Tensor | None) -> Compute:
    return lambda x: F.linear(x, weight, bias)


def _reordered(weight: Tensor, bias: Tensor | None) -> Compute:
    packed = reorder(weight)
    return lambda x: LINEAR(x, packed, bias, "none", [], "")


def in_blocks(compute: Compute, x: Tensor, most: int | None) -> Tensor:
    """A product of rows, made of products of at most so many of them."""
    if most is None or len(x) <= most:
        return compute(x)
    return torch.cat([compute(rows) for rows in x.split(most)])


def can_reorder(weight: Tensor) -> bool:
    """Whether oneDNN can hold a weight in the order that its kernels read."""
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return weight.device.type == "cpu" and has_onednn


def reorder(weight: Tensor) -> Tensor:
    """Bring a weight `(d_out, d_in)` into that order once, instead of in each call."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, REORDERED_FOR_ROWS)
    return packed
