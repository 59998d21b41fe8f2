"""What one adapter adds to one product: `y + s B A x`.

A product holds several linear layers side by side, and an adapter has an A and a B for each of
these parts. All A stand side by side in one weight. There are several forms of the rest, which give
the same bits on the CPUs that were measured; `invariance` checks that at start:

- per part, with the parts' own B: least arithmetic, for many rows;
- whole, with one B that is zero where a part meets another's A: fewest calls, for few rows;
- whole in oneDNN's order: in bfloat16 half the time of the former. Bringing all weights of an
  adapter into it takes longer than a first token, so it is there some time after the others;
- in a stack beside other adapters, see `LoraStack`.
"""

import math
from collections.abc import Sequence

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
        whole: The B of all parts, each below and beside the one before, zero elsewhere:
            `(parts * rank, d_out)`.
        d_outs: The parts' share of d_out.
        scaling: s, alpha / rank.

    Attributes:
        a, scaling: As given.
        rank: Of each part.
        parts: The B of each part, `(rank, d_out of the part)`, which lie in `whole`.
    """

    def __init__(self, a: Tensor, whole: Tensor, d_outs: Sequence[int], scaling: float) -> None:
        self.a, self.scaling = a, scaling
        self.rank = len(whole) // len(d_outs)
        beside = whole.split_with_sizes(list(d_outs), 1)
        self.parts = tuple(
            part[number * self.rank : (number + 1) * self.rank]
            for number, part in enumerate(beside)
        )
        self._whole, self._d_outs = whole, list(d_outs)
        self._reordered: tuple[Tensor, Tensor] | None = None

    @property
    def _can_reorder(self) -> bool:
        # oneDNN takes no s, and only a power of two in B leaves the rounding of bfloat16 as it is.
        is_power = math.frexp(self.scaling)[0] == 0.5
        return self.a.dtype == torch.bfloat16 and can_reorder(self.a) and is_power

    @property
    def bytes(self) -> int:
        """What the weights take, once they are reordered."""
        size = self.a.nbytes + self._whole.nbytes
        return 2 * size if self._can_reorder else size

    @property
    def is_slow(self) -> bool:
        """Whether `reorder` makes it faster."""
        return self._reordered is None and self._can_reorder

    def reorder(self) -> None:
        """Have the weights in oneDNN's order too, where it takes them; from any thread."""
        if self.is_slow:
            b = (self._whole * self.scaling).t().contiguous()
            self._reordered = (reorder(self.a.t().contiguous()), reorder(b))

    def added(self, rule: RowRule, y: Tensor, x: Tensor) -> Tensor:
        """Add to all rows.

        Args:
            rule: How many rows products have.
            y: `(T, d_out)`, T as the rule says; it may be changed.
            x: `(T, d_in)`.

        Returns:
            The sum, which may be y.
        """
        reordered = self._reordered
        if reordered is None or not self._is_fast(rule, y):
            self.add(rule, y, x)
            return y
        a, b = reordered
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
        updates = update.split_with_sizes([self.rank] * len(self.parts), 1)
        own_y = y.split_with_sizes(self._d_outs, 1)
        for part, own, b in zip(own_y, updates, self.parts, strict=True):
            part.addmm_(own, b, alpha=self.scaling)

    def _is_fast(self, rule: RowRule, y: Tensor) -> bool:
        """Whether a form is taken that has few calls."""
        few = len(y) <= WHOLE_ROWS_MAX and not rule.in_blocks
        return few and self.rank in rule.ranks_fast
