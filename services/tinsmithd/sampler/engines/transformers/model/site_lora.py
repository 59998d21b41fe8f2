"""What one adapter adds to one product: `y + s B A x`.

A product holds several linear layers side by side, and an adapter has an A and a B for each of
these parts. All A stand side by side in one weight. There are several forms of the rest, which give
the same bits on the CPUs that were measured; `invariance` checks that at start:

- per part, with the parts' own B: least arithmetic, for many rows;
- whole, with one B that is zero where a part meets another's A: fewest calls, for few rows;
- whole in oneDNN's order: in bfloat16 half the time of the former;
- in a stack beside other adapters, see `LoraStack`.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tinsmithd.sampler.engines.transformers.model.linear import (
    BLOCK_ROWS,
    LINEAR,
    LINEAR_PLUS,
    RowRule,
    blocks,
    can_reorder,
    reorder,
)

WHOLE_ROWS_MAX = 64
"""Maximum rows for which calls cost more than arithmetic."""


class SiteLora:
    """An adapter's weights for one product.

    Args:
        a: The A of all parts side by side, `(d_in, parts * rank)`.
        parts: The B of each part, `(rank, d_out of the part)`; zero where the adapter leaves a part
            alone.
        scaling: s, alpha / rank.

    Attributes:
        a, parts, scaling: As given.
    """

    def __init__(self, a: Tensor, parts: Sequence[Tensor], scaling: float) -> None:
        self.a, self.parts, self.scaling = a, tuple(parts), scaling
        self._whole = parts[0] if len(parts) == 1 else _diagonal(parts)
        self._reordered: tuple[Tensor, Tensor] | None = None
        # oneDNN takes no s, and only a power of two in B leaves the rounding of bfloat16 as it is.
        if a.dtype == torch.bfloat16 and can_reorder(a) and math.frexp(scaling)[0] == 0.5:
            b = (self._whole * scaling).t().contiguous()
            self._reordered = (reorder(a.t().contiguous()), reorder(b))

    def tensors(self) -> Iterator[Tensor]:
        """All weights."""
        yield self.a
        yield from self.parts
        if len(self.parts) > 1:
            yield self._whole
        yield from self._reordered or ()

    @property
    def bytes(self) -> int:
        """What they take."""
        return sum(tensor.numel() * tensor.dtype.itemsize for tensor in self.tensors())

    def added(self, rule: RowRule, y: Tensor, x: Tensor) -> Tensor:
        """Add to all rows.

        Args:
            rule: How many rows products have.
            y: `(T, d_out)`, T as the rule says; it may be changed.
            x: `(T, d_in)`.

        Returns:
            The sum, which may be y.
        """
        if self._reordered is None or not self._is_fast(rule, y):
            self.add(rule, y, x)
            return y
        a, b = self._reordered
        total: Tensor = LINEAR_PLUS(LINEAR(x, a, None, "none", [], ""), y, b, None, "add")
        return total

    def add(self, rule: RowRule, y: Tensor, x: Tensor) -> None:
        """As `added`, into y."""
        if rule.in_blocks and len(y) > BLOCK_ROWS:
            for rows_y, rows_x in zip(blocks(y), blocks(x), strict=True):
                self.add(rule, rows_y, rows_x)
            return
        update = torch.mm(x, self.a)
        if len(self.parts) == 1 or self._is_fast(rule, y):
            y.addmm_(update, self._whole, alpha=self.scaling)
            return
        updates = update.split_with_sizes([len(b) for b in self.parts], 1)
        own_y = y.split_with_sizes([b.shape[1] for b in self.parts], 1)
        for part, own, b in zip(own_y, updates, self.parts, strict=True):
            part.addmm_(own, b, alpha=self.scaling)

    def _is_fast(self, rule: RowRule, y: Tensor) -> bool:
        """Whether a form is taken that has few calls."""
        few = len(y) <= WHOLE_ROWS_MAX and not rule.in_blocks
        return few and len(self.parts[0]) in rule.ranks_fast


def _diagonal(parts: Sequence[Tensor]) -> Tensor:
    """The parts one below the other and one beside the other, zero elsewhere."""
    rank, d_out = len(parts[0]), sum(part.shape[1] for part in parts)
    whole = parts[0].new_zeros((rank * len(parts), d_out))
    place = 0
    for number, part in enumerate(parts):
        whole[number * rank : (number + 1) * rank, place : place + part.shape[1]] = part
        place += part.shape[1]
    return whole
