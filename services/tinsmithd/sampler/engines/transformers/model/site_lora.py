"""What adapters add to one product: `y + s B A x`.

A product holds several linear layers side by side, and an adapter has an A and a B for each of
these parts. Several adapters of one rank may be computed together, each for rows of its own: their
A stand side by side, a row keeps of `A x` what its own adapter made, zeros meet the B of others.

There are two forms, of which a site has one:

- in bfloat16 on a CPU, two calls of oneDNN: one for all A, and one for all B, with zeros where a
  part meets another's A. A call costs more than the arithmetic of few rows;
- else a product for all A and one for each part's B.
"""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmithd.sampler.engines.transformers.model.linear import (
    BLOCK_ROWS,
    LINEAR,
    LINEAR_PLUS,
    RowRule,
    can_reorder,
    cuts_of,
    reorder,
)

SUM_MAX = 768
"""Longest sum of one product of A in the second form: MKL shares longer ones between threads, and
how depends on the number of rows."""

COLUMNS_STEP = 32
"""`A x` has a multiple of it as columns in the first form. AMX multiplies so many at once, and how
it sums what is left over depends on how much that is."""

COLUMNS_MIN = 64
"""Least columns of A there: oneDNN shares the sums of fewer ones between threads, and how depends
on the number of rows."""

ALONE = (BLOCK_ROWS,)
"""Rows of an adapter whose rank or form was not tried: always the same."""


class SiteLora:
    """The weights of one adapter, or of several, for one product.

    Args:
        a: All A, `(count, d_in)`, by part, then adapter, then rank; more rows are zero. It and b
            are taken over.
        b: All B, those of a part beside each other, each part below the one before and zero
            elsewhere: `(d_out, count)`; more columns are zero.
        d_outs: The parts' share of d_out.
        rank: Of each part of each adapter.
        scaling: s, alpha / rank.
        adapters: How many.

    Attributes:
        d_outs, rank: As given.
        columns: Of what `down` gives: count, and zeros.
    """

    _a: Tensor
    _b: Tensor
    """Of the first form."""
    _a_turned: Tensor
    _b_turned: Tensor
    """Of the second."""

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        d_outs: Sequence[int],
        rank: int,
        scaling: float,
        adapters: int = 1,
    ) -> None:
        self._shape(d_outs, rank, adapters)
        takes_narrow = a.dtype == torch.bfloat16 and can_reorder(a)
        # oneDNN takes no s, and only a power of two in B leaves the rounding of bfloat16 as it is.
        self._is_narrow = takes_narrow and math.frexp(scaling)[0] == 0.5
        self._is_tried = self._is_narrow or not takes_narrow
        if self._is_narrow:
            self.columns, rows = columns_of(self._count)
            self._a = a if len(a) == rows else F.pad(a, (0, 0, 0, rows - len(a)))
            missing = self.columns - b.shape[1]
            self._b = (F.pad(b, (0, missing)) if missing else b).mul_(scaling)
            return
        self._scaling = scaling
        # In this order MKL has the same bits at more numbers of rows.
        self._a_turned = a[: self._count].t().contiguous()
        self._b_turned = b[:, : self._count].t().contiguous()
        if b.dtype == torch.float32 and scaling != 1:
            # MKL multiplies with s sooner or later; how many rows there are decides.
            self._b_turned.mul_(scaling)
            self._scaling = 1.0

    @classmethod
    def turned(cls, a: Tensor, b: Tensor, d_outs: Sequence[int], rank: int) -> "SiteLora":
        """One adapter's weights, in float32 and in the order in which products take them.

        Args:
            a: `(d_in, count)`; it and b are taken over.
            b: `(count, d_out)`, with s.
            d_outs, rank: As for others.
        """
        made = cls.__new__(cls)
        made._shape(d_outs, rank, adapters=1)
        made._a_turned, made._b_turned = a, b
        return made

    def _shape(self, d_outs: Sequence[int], rank: int, adapters: int) -> None:
        count = rank * adapters * len(d_outs)
        self._count, self.columns = count, count
        self.d_outs, self.rank, self._adapters = list(d_outs), rank, adapters
        self._is_narrow, self._is_tried = False, True
        self._scaling = 1.0
        self._reordered: tuple[Tensor, Tensor] | None = None

    @property
    def a(self) -> Tensor:
        """All A, as given."""
        return self._a if self._is_narrow else self._a_turned.t()

    @property
    def b(self) -> Tensor:
        """All B, as given; s may be in it."""
        return self._b if self._is_narrow else self._b_turned.t()

    @functools.cached_property
    def _parts(self) -> list[Tensor]:
        """B of each part."""
        parts = self._b_turned.split_with_sizes(self.d_outs, 1)
        return [part.chunk(len(self.d_outs))[number] for number, part in enumerate(parts)]

    @classmethod
    def beside(cls, sites: Sequence["SiteLora | None"]) -> "SiteLora | None":
        """Several adapters' weights for one product; None where none has any.

        Args:
            sites: Theirs, of one rank and scaling; None for one that does not stand here.
        """
        like = next((site for site in sites if site is not None), None)
        if like is None:
            return None
        adapters, parts, rank = len(sites), len(like.d_outs), like.rank
        columns, rows = columns_of(parts * adapters * rank)
        count = parts * adapters * rank
        a = like.a.new_zeros((rows, like.a.shape[1]))
        b = like.b.new_zeros((len(like.b), columns))
        all_a = a[:count].unflatten(0, (parts, adapters, rank))
        all_b = b[:, :count].unflatten(1, (parts, adapters, rank))
        for place, site in enumerate(sites):
            if site is not None:
                all_a[:, place] = site.a[: site._count].unflatten(0, (parts, rank))
                all_b[:, :, place] = site.b[:, : site._count].unflatten(1, (parts, rank))
        made = cls(a, b, like.d_outs, rank, like._scaling, adapters)
        if made._is_narrow:
            made.reorder()
            made._a = made._b = a.new_empty(0)  # not needed any more
        return made

    def wide(self) -> tuple[Tensor, Tensor]:
        """A and B in float32, `(d_in, count)` and `(count, d_out)`, with s: views if they can be.

        The rows of B are by part, as the columns of A; what meets another part is zero.
        """
        if not self._is_narrow and self._scaling == 1 and self._b_turned.dtype == torch.float32:
            return self._a_turned, self._b_turned
        a, b = self.a[: self._count].t(), self.b[:, : self._count].t().float()
        return a.float().contiguous(), (b if self._scaling == 1 else b * self._scaling).contiguous()

    @property
    def bytes(self) -> int:
        """What the weights take, once they are reordered."""
        size = self.a.nbytes + self.b.nbytes
        return 2 * size if self._is_narrow else size

    @property
    def can_stand_beside(self) -> bool:
        """Whether zeros silence all weights, and their form is one that was tried beside others."""
        return self._is_tried and bool(self.a.isfinite().all() and self.b.isfinite().all())

    @property
    def is_slow(self) -> bool:
        """Whether `reorder` makes it faster."""
        return self._is_narrow and self._reordered is None

    def reorder(self) -> None:
        """Have the weights in oneDNN's order too, where it computes with them; from any thread.

        It takes them in any order, with the same bits, but else reorders them in each call.
        """
        if self.is_slow:
            self._reordered = reorder(self.a), reorder(self.b)

    def added(
        self,
        rule: RowRule,
        y: Tensor,
        x: Tensor,
        others: Tensor | None = None,
        *,
        of_prompts: bool = False,
    ) -> Tensor:
        """Add to all rows.

        Args:
            rule: How many rows products have.
            y: `(T, d_out)`; it may be changed.
            x: `(T, d_in)`.
            others: Where there are several adapters, bool `(T, 1, adapters, 1)`: which are not the
                row's.
            of_prompts: The rows are of prompts, not of sequences.

        Returns:
            The sum, which may be y.
        """
        sizes = rule.lora_few if others is None else rule.beside
        if of_prompts and self.rank in rule.lora_many:
            sizes = rule.lora_many
        cuts = cuts_of(len(y), sizes.get(self.rank, ALONE) if self._is_tried else ALONE)
        found = []
        for start, read, kept in cuts:
            if read == len(y):
                return self._added(y, x, others)
            here = slice(start, start + kept)
            mask = None if others is None else _filled(others[here], read)
            block = self._added(_filled(y[here], read), _filled(x[here], read), mask)
            found.append(block[:kept])
        return found[0] if len(found) == 1 else torch.cat(found)

    def _added(self, y: Tensor, x: Tensor, others: Tensor | None) -> Tensor:
        update = self.down(x)
        if others is not None:
            own = update[:, : self._count].unflatten(1, (-1, self._adapters, self.rank))
            own.masked_fill_(others, 0)
        return self.up(update, y)

    def down(self, x: Tensor) -> Tensor:
        """`A x` of all adapters and zeros behind it, `(T, columns)`."""
        if self._is_narrow:
            a = self._a if self._reordered is None else self._reordered[0]
            made: Tensor = LINEAR(x, a, None, "none", [], "")
            return made if made.shape[1] == self.columns else made[:, : self.columns].contiguous()
        a = self._a_turned
        update = torch.mm(x[:, :SUM_MAX], a[:SUM_MAX])
        for start in range(SUM_MAX, len(a), SUM_MAX):
            update.addmm_(x[:, start : start + SUM_MAX], a[start : start + SUM_MAX])
        return update

    def up(self, update: Tensor, y: Tensor) -> Tensor:
        """`y + s B A x`, of what `down` gives; y may be changed."""
        if self._is_narrow:
            b = self._b if self._reordered is None else self._reordered[1]
            total: Tensor = LINEAR_PLUS(update, y, b, None, "add")
            return total
        if len(self._parts) == 1:
            return y.addmm_(update, self._parts[0], alpha=self._scaling)
        updates = update.chunk(len(self._parts), 1)
        own_y = y.split_with_sizes(self.d_outs, 1)
        for part, own, b in zip(own_y, updates, self._parts, strict=True):
            part.addmm_(own, b, alpha=self._scaling)
        return y


def columns_of(count: int) -> tuple[int, int]:
    """So many columns of `A x` in the first form, zeros included: of B, and of A."""
    columns = -(-count // COLUMNS_STEP) * COLUMNS_STEP
    return columns, max(columns, COLUMNS_MIN)


def _filled(rows: Tensor, count: int) -> Tensor:
    """Rows filled up to so many; nobody looks at the rest."""
    missing = count - len(rows)
    if missing == 0:
        return rows
    return torch.cat((rows, rows[:1].expand(missing, *rows.shape[1:])))
