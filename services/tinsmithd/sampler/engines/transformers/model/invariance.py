"""Finds out how many rows may be computed together so that the bits of a row are its own.

Which kernel a library takes, and in which order that sums, is nowhere promised, so it is tried: on
weights of the shapes in use, in the form in use, at many numbers of rows. Two orders of a sum
mostly round to the same bfloat16, so the sums are made to cancel: what they leave is all rounding.
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmithd.sampler.engines.transformers.model.decoder import Decoder
from tinsmithd.sampler.engines.transformers.model.linear import (
    BLOCK_ROWS,
    ROWS_STEP,
    Compute,
    Product,
    RowRule,
    Window,
)
from tinsmithd.sampler.engines.transformers.model.lora_layout import LoraLayout
from tinsmithd.sampler.engines.transformers.model.lora_stack import STACK_ADAPTERS_MAX
from tinsmithd.sampler.engines.transformers.model.site_lora import SiteLora

COUNTS = (4, 8, 12, 16, 20, 24, 28, 32, 36, 48, 64, 96, 128, 200, 256, 512)
"""Numbers of rows that are tried, besides the largest in use."""

MANY_ROWS: tuple[int, ...] = (64, 128)
"""Numbers of rows that are tried for products of prompts, where not all numbers are alike. A short
prompt pays for as many as the first; beyond the last there is little to gain."""

HEAD_COUNTS = (4, 8, 12, 16, 32, 64, 128)
"""Numbers that are tried on the head, which is the largest product."""

FEW_COUNTS = (1, 2, 3, 5, 7, 13, 14, 15, 16, 23, 28, 29, 64)
"""Numbers that are tried on the head's form of few rows, which has any number."""

LORA_RANKS = (16, 32, 64)
"""Ranks of adapters that are tried; others are computed `ROWS_STEP` rows at a time."""

BESIDE_RANK_MAX = 32
"""Largest padded rank that is computed side by side: each row is multiplied by all adapters."""

SCALING = 2.0
"""Of adapters that are tried; a power of two, see `SiteLora`."""

BESIDE_COUNTS = (4, 8, 12, 16, 20, 24, 28, 32, 48, 64)
"""Numbers of rows that are tried with several adapters side by side."""


@torch.inference_mode()
def decide_rule(decoder: Decoder, layout: LoraLayout, rows_max: int, keep: bool) -> bool:
    """Set how a decoder computes, so that the bits of a row depend on no other row.

    Args:
        decoder: Nothing that counts was computed with it yet.
        layout: Where adapters can stand.
        rows_max: Maximum rows of one forward.
        keep: Make products of fewer rows where that takes it.

    Returns:
        Whether they depend on no other row.
    """
    rule, head = decoder.rule, decoder.head
    largest = rule.padded(rows_max)
    every = Window(ROWS_STEP, largest)
    counts = [count for count in COUNTS if count < largest] + [largest]
    window = every
    for compute, row in _layer_products(decoder):
        window = window.within(alike(compute, row, counts))
    row = _head_row(decoder)
    window = window.within(_unless_all(alike(head.compute, row, HEAD_COUNTS), HEAD_COUNTS))
    few = head.compute_few
    if few is not None and alike(few, row, FEW_COUNTS) != Window(FEW_COUNTS[0], FEW_COUNTS[-1]):
        head.compute_few = None
    alone = _decide_loras(rule, layout, counts, row[:0])
    apart = {window, *alone.values()} == {every}
    if not keep:
        alone = dict.fromkeys(alone, every)
    rule.lora_few = {rank: each.sizes for rank, each in alone.items()}
    if keep and window != every:
        has_few = window.least == ROWS_STEP and window.most >= BLOCK_ROWS
        rule.few = window.sizes if has_few else (BLOCK_ROWS,)
        _decide_many(decoder, layout)
    return apart or keep


def _layer_products(decoder: Decoder) -> Iterator[tuple[Compute, Tensor]]:
    """A product of each shape that a decoder's layers have, and a row for it whose sums cancel."""
    like = _head_row(decoder)[:0]
    shapes = {(each.d_out, each.d_in) for each in decoder.products() if each is not decoder.head}
    for d_out, d_in in sorted(shapes):
        weight, row = _cancelling(d_out, d_in, like)
        yield Product(weight, None).compute, row


def _head_row(decoder: Decoder) -> Tensor:
    """A row for the head, `(1, hidden)`: float32 logits show all bits of a sum."""
    shape = decoder.shape
    like = torch.empty(0, dtype=shape.dtype, device=shape.device)
    return _random((1, shape.hidden), like)


def _decide_many(decoder: Decoder, layout: LoraLayout) -> None:
    """Set the numbers of rows of prompts' products, where there are some that are alike."""
    rule = decoder.rule
    rule.many = _first_alike(partial(_sizes_of_base, decoder))
    for rank in LORA_RANKS if rule.many else ():
        sizes = _first_alike(partial(_sizes_of_loras, layout, rank, _head_row(decoder)[:0]))
        if sizes:
            rule.lora_many[rank] = sizes


def _first_alike(find: Callable[[tuple[int, ...]], tuple[int, ...]]) -> tuple[int, ...]:
    """Those of `MANY_ROWS` that are as the least that can be had; none where all vary."""
    tried = (find(MANY_ROWS[first:]) for first in range(len(MANY_ROWS)))
    return next(filter(None, tried), ())


def _sizes_of_base(decoder: Decoder, sizes: tuple[int, ...]) -> tuple[int, ...]:
    products = (*_layer_products(decoder), (decoder.head.compute, _head_row(decoder)))
    for compute, row in products:
        sizes = equal_sizes(compute, row, sizes)
    return sizes


def _sizes_of_loras(
    layout: LoraLayout, rank: int, like: Tensor, sizes: tuple[int, ...]
) -> tuple[int, ...]:
    for site, rows in _tried_sites(layout, rank, like):
        sizes = sizes_alone(site, rows, sizes)
    return sizes


def alike(
    compute: Compute, row_1D: Tensor, counts: Sequence[int], expected_1D: Tensor | None = None
) -> Window:
    """Around which numbers of rows a product gives a row the same bits.

    Args:
        compute: The product.
        row_1D: What to try it on: all rows are equal.
        counts: Numbers to try, ascending, `BLOCK_ROWS` among them.
        expected_1D: The result; None: what `BLOCK_ROWS` rows give.

    Returns:
        The widest window of counts; `BLOCK_ROWS` alone where there is none.
    """
    if expected_1D is None:
        expected_1D = compute(row_1D.repeat(BLOCK_ROWS, 1))[:1].clone()
    least = most = BLOCK_ROWS
    middle = counts.index(BLOCK_ROWS)

    def same(count: int) -> bool:
        found = compute(row_1D.repeat(count, 1))
        return torch.equal(found, expected_1D.expand_as(found))

    for count in itertools.takewhile(same, reversed(counts[: middle + 1])):
        least = count
    for count in itertools.takewhile(same, counts[middle + 1 :]):
        most = count
    return Window(least, most)


def _unless_all(window: Window, counts: Sequence[int]) -> Window:
    """A window, without bounds where all that was tried is within it."""
    least = ROWS_STEP if window.least == counts[0] else window.least
    return Window(least, sys.maxsize if window.most == counts[-1] else window.most)


def equal_sizes(
    compute: Compute, row_1D: Tensor, sizes: Sequence[int], expected_1D: Tensor | None = None
) -> tuple[int, ...]:
    """Which numbers of rows give a row the same bits as the first of them does; see `alike`."""
    found: list[int] = []
    for size in sizes:
        made = compute(row_1D.repeat(size, 1))
        if expected_1D is None:
            expected_1D = made[:1].clone()
        if torch.equal(made, expected_1D.expand_as(made)):
            found.append(size)
    return tuple(found) if found and found[0] == sizes[0] else ()


def _decide_loras(
    rule: RowRule, layout: LoraLayout, counts: Sequence[int], like: Tensor
) -> dict[int, Window]:
    """Set how adapters are computed side by side; how many rows they may have alone, by rank."""
    found = {}
    for rank in LORA_RANKS:
        alone = Window(ROWS_STEP, counts[-1])
        beside = Window(ROWS_STEP, BESIDE_COUNTS[-1])
        *layers, head = _tried_sites(layout, rank, like)
        for site, rows in layers:
            alone = alone.within(rows_alone(site, rows, counts))
            if rank <= BESIDE_RANK_MAX:
                beside = beside.within(rows_beside(site, rows))
        found[rank] = alone.within(_unless_all(rows_alone(*head, HEAD_COUNTS), HEAD_COUNTS))
        if rank <= BESIDE_RANK_MAX and beside.most >= BLOCK_ROWS:
            rule.beside[rank] = beside.sizes
    return found


def _tried_sites(
    layout: LoraLayout, rank: int, like: Tensor
) -> Iterator[tuple[SiteLora, tuple[Tensor, Tensor]]]:
    """An adapter of each shape of a site, the head's last; see `cancelling_site`."""
    for d_in, *d_outs in _shapes(layout):
        yield cancelling_site(d_in, d_outs, rank, like)
    yield cancelling_site(layout.head.d_in, [layout.head.d_out], rank, like.float())


def rows_alone(site: SiteLora, rows: tuple[Tensor, Tensor], counts: Sequence[int]) -> Window:
    """How many rows an adapter may have together; see `alike`. It is reordered meanwhile."""
    expected: dict[int, Tensor] = {}
    window = Window(counts[0], counts[-1])
    for number, form, row in _forms(site, rows):
        if number not in expected:
            expected[number] = form(row.repeat(BLOCK_ROWS, 1))[:1].clone()
        window = window.within(alike(form, row, counts, expected[number]))
    return window


def sizes_alone(
    site: SiteLora, rows: tuple[Tensor, Tensor], sizes: tuple[int, ...]
) -> tuple[int, ...]:
    """Which numbers of rows are alike of an adapter, which is reordered; see `equal_sizes`."""
    expected: dict[int, Tensor] = {}
    for number, form, row in _forms(site, rows):
        if number not in expected and sizes:
            expected[number] = form(row.repeat(sizes[0], 1))[:1].clone()
        sizes = equal_sizes(form, row, sizes, expected.get(number))
    return sizes


def _forms(site: SiteLora, rows: tuple[Tensor, Tensor]) -> Iterator[tuple[int, Compute, Tensor]]:
    """Both products of an adapter, 0 and 1, and a row for each; again in the other order."""
    for _ in range(2):
        yield 0, site.down, rows[0]
        yield 1, _up_of(site), rows[1]
        site.reorder()


def rows_beside(site: SiteLora, rows: tuple[Tensor, Tensor]) -> Window:
    """How many rows an adapter may have together, side by side with others."""
    parts, rank = len(site.d_outs), site.rank
    row_a, row_b = rows
    own = [row.repeat(BLOCK_ROWS, 1) for row in rows]
    expected = site.down(own[0])[:1].clone(), site.up(own[1], _zeros(own[1], site))[:1].clone()
    a, b = (_random(weight.shape, weight, seed=9) for weight in (site.a, site.b))
    other = SiteLora(a, b, site.d_outs, site.rank, SCALING)
    window = Window(BESIDE_COUNTS[0], BESIDE_COUNTS[-1])
    for count in (2, STACK_ADAPTERS_MAX):
        place = count // 2
        both = SiteLora.beside([site if i == place else other for i in range(count)])
        assert both is not None
        wide_row = row_b.new_zeros((1, parts, count, rank))
        wide_row[:, :, place] = row_b[:, : parts * rank].view(1, parts, rank)
        forms = _down_of(both, site, count), _up_of(both)
        inputs = row_a, _padded(wide_row.flatten(1), both)
        for form, row, result in zip(forms, inputs, expected, strict=True):
            if not torch.equal(form(row.repeat(BLOCK_ROWS, 1))[:1], result):
                return Window(BLOCK_ROWS, 0)
            window = window.within(alike(form, row, BESIDE_COUNTS, result))
    return window


def _down_of(both: SiteLora, site: SiteLora, count: int) -> Compute:
    """What the adapter in the middle of so many makes, as it does alone."""
    shape = len(site.d_outs), count, site.rank

    def down(x: Tensor) -> Tensor:
        made = both.down(x)[:, : math.prod(shape)].unflatten(1, shape)
        return _padded(made[:, :, count // 2].flatten(1), site)

    return down


def _up_of(site: SiteLora) -> Compute:
    """The second product, onto nothing."""
    return lambda update: site.up(update, _zeros(update, site))


def _padded(update: Tensor, site: SiteLora) -> Tensor:
    """A row of as many columns as `SiteLora.down` gives."""
    return F.pad(update, (0, site.columns - update.shape[1]))


def _zeros(update: Tensor, site: SiteLora) -> Tensor:
    """What nothing was added to yet."""
    return update.new_zeros((len(update), sum(site.d_outs)))


def _shapes(layout: LoraLayout) -> list[tuple[int, ...]]:
    """The size of the rows, and those of the parts, of each shape of a site."""
    sites = [site for layer in layout.layers for site in layer.sites if site]
    return sorted({(site[0].d_in, *(part.d_out for part in site)) for site in sites})


def cancelling_site(
    d_in: int, d_outs: Sequence[int], rank: int, like: Tensor
) -> tuple[SiteLora, tuple[Tensor, Tensor]]:
    """An adapter of a site, and rows for its A and for its B whose sums cancel."""
    a, row_a = _cancelling(len(d_outs) * rank, d_in, like)
    parts = [_cancelling(d_out, rank, like, seed=number) for number, d_out in enumerate(d_outs)]
    b = torch.block_diag(*(weight for weight, _ in parts))
    row_b = torch.cat([row for _, row in parts], 1)
    site = SiteLora(a, b, d_outs, rank, SCALING)
    return site, (row_a, _padded(row_b, site))


def _cancelling(d_out: int, d_in: int, like: Tensor, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight `(d_out, d_in)` and a row `(1, d_in)`, the halves of whose product cancel."""
    weight, row = (_random((n, d_in // 2), like, seed=seed + n) for n in (d_out, 1))
    # Of many magnitudes, so that nearly every addition rounds.
    row = row * _random(row.shape, like.float(), seed=seed).mul_(4).exp2().to(like)
    both = torch.cat((weight, -weight), 1), torch.cat((row, row), 1)
    weight, row = (F.pad(half, (0, d_in % 2)) for half in both)
    return weight, row


def _random(shape: Sequence[int], like: Tensor, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator).to(like)
