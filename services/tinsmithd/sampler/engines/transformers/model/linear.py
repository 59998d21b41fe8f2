"""Products with fixed weights: fast at few rows, and the same for a row whatever stands beside it.

A row of `x W^T` is a sum that a library may order otherwise for other numbers of rows. On the CPUs
that were measured it does so at a single row (oneDNN), at what a number of rows leaves when divided
by 4 (MKL), or above 32 rows (oneDNN with AMX). So a product has a number of rows that was found to
be alike, and more rows are products of their own. `invariance` finds out at start which these are:
for the next tokens of sequences, of which there may be one, and for prompts, which have many rows
and are twice as fast in larger products.
"""

import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
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

    @property
    def sizes(self) -> Sequence[int]:
        """All of them, ascending."""
        return range(self.least, self.most + 1, ROWS_STEP)

    def within(self, other: "Window") -> "Window":
        """What both allow."""
        return Window(max(self.least, other.least), min(self.most, other.most))


class RowRule:
    """How many rows the products of a decoder have: sizes in ascending order.

    Attributes:
        few: Those of sequences, multiples of the first.
        many: Those of prompts; empty: as those of sequences.
        lora_few: Those of an adapter, by its padded rank.
        lora_many: Those of an adapter over prompts; ranks that are not here: as `lora_few`.
        beside: Those of adapters side by side; ranks that are not here are not computed so.

    All are decided before anything that counts is computed.
    """

    def __init__(self) -> None:
        self.few: Sequence[int] = range(ROWS_STEP, sys.maxsize, ROWS_STEP)
        self.many: Sequence[int] = ()
        self.lora_few: dict[int, Sequence[int]] = {}
        self.lora_many: dict[int, Sequence[int]] = {}
        self.beside: dict[int, Sequence[int]] = {}

    def padded(self, count: int) -> int:
        """So many rows, filled up to those of whole products of sequences."""
        return -(-count // self.few[0]) * self.few[0]


class Cut(NamedTuple):
    """Rows of one product: `read` of them from `start` on, of which the first `kept` count."""

    start: int
    read: int
    kept: int


def cuts_of(count: int, sizes: Sequence[int]) -> Iterator[Cut]:
    """Products of the given sizes that have `count` rows, each row in one; the last may read on."""
    start = 0
    while start < count:
        left = count - start
        read = sizes[-1] if left > sizes[-1] else sizes[bisect_left(sizes, left)]
        kept = min(left, read)
        yield Cut(start, read, kept)
        start += kept


class Rows:
    """The rows of one forward, and the products that they are in.

    Args:
        rule: How many rows products have.
        count: Rows that are wanted, at least one.
        sequences: How many of them, the first, are next tokens of sequences, not of prompts.

    Attributes:
        count: As given.
        total: All rows, those that fill up included.
    """

    def __init__(self, rule: RowRule, count: int, sequences: int) -> None:
        if not rule.many:
            sequences = count
        cuts = list(cuts_of(sequences, rule.few))
        prompts = cuts_of(count - sequences, rule.many)
        # A product of sequences that reads on reads rows of prompts, which it does not keep.
        cuts += [Cut(sequences + start, read, kept) for start, read, kept in prompts]
        self.count = count
        self.total = max(cut.start + cut.read for cut in cuts)
        cuts[-1] = cuts[-1]._replace(kept=self.total - cuts[-1].start)
        self._cuts = cuts

    def filled(self, x: Tensor) -> Tensor:
        """`(count, ...)` filled up with zeros to `(total, ...)`."""
        missing = self.total - self.count
        return F.pad(x, (0,) * (2 * x.dim() - 1) + (missing,)) if missing else x

    def product(self, compute: Compute, x: Tensor) -> Tensor:
        """Map `(total, d_in)` to a new `(total, d_out)`."""
        if len(self._cuts) == 1:
            return compute(x)
        found = (compute(x[start : start + read])[:kept] for start, read, kept in self._cuts)
        return torch.cat(list(found))


class Product:
    """`x W^T + b` of a weight that never changes, in the fastest form there is.

    Where that is not the weight as it is, the weight is not kept.

    Args:
        weight: `(d_out, d_in)`.
        bias: `(d_out,)`.

    Attributes:
        d_out, d_in: The weight's sizes.
        compute: The product of any number of rows, whose bits depend on it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.d_out, self.d_in = weight.shape
        make = _reordered if can_reorder(weight) else _plain
        self.compute: Compute = make(weight, bias)

    def __call__(self, x: Tensor, rows: Rows) -> Tensor:
        """Map all rows of a forward, `(T, d_in)`, to a new `(T, d_out)`."""
        return rows.product(self.compute, x)


def _plain(weight: Tensor, bias: Tensor | None) -> Compute:
    return lambda x: F.linear(x, weight, bias)


def _reordered(weight: Tensor, bias: Tensor | None) -> Compute:
    packed = reorder(weight)
    return lambda x: LINEAR(x, packed, bias, "none", [], "")


def can_reorder(weight: Tensor) -> bool:
    """Whether oneDNN can hold a weight in the order that its kernels read.

    On a CPU that has nothing for bfloat16 it refuses to.
    """
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if weight.device.type != "cpu" or not has_onednn:
        return False
    return weight.dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def reorder(weight: Tensor) -> Tensor:
    """Bring a weight `(d_out, d_in)` into that order once, instead of in each call."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, REORDERED_FOR_ROWS)
    return packed
