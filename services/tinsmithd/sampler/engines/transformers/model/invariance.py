"""Finds out whether the bits of a row depend on how many rows are computed together, and how.

Which kernel a library takes, and in which order that sums, is nowhere promised, so it is tried: on
the shapes in use, in the form in use, at many numbers of rows.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from tinsmithd.sampler.engines.transformers.model.decoder import Decoder
from tinsmithd.sampler.engines.transformers.model.linear import ROWS_STEP, Compute, RowRule
from tinsmithd.sampler.engines.transformers.model.lora_layout import LoraLayout, Site
from tinsmithd.sampler.engines.transformers.model.lora_stack import LoraStack
from tinsmithd.sampler.engines.transformers.model.lora_weights import LoraWeights
from tinsmithd.sampler.engines.transformers.model.site_lora import WHOLE_ROWS_MAX, SiteLora

COUNTS = (4, 8, 12, 16, 20, 24, 28, 32, 36, 48, 60, 64, 96, 128, 200, 256)
"""Numbers of rows that are tried, besides the largest in use."""

HEAD_ROWS_MAX = 64
"""Rows that are tried on the head, which is the largest product."""

LORA_COUNTS = (4, 8, 16, WHOLE_ROWS_MAX, WHOLE_ROWS_MAX + ROWS_STEP, 256)
"""Numbers of rows that are tried with adapters."""

LORA_RANKS = (8, 16, 32, 64)
"""Ranks of adapters that are tried."""


@torch.inference_mode()
def decide_rule(decoder: Decoder, layout: LoraLayout, rows_max: int) -> bool:
    """Set how a decoder computes, so that the bits of a row depend on no other row.

    Args:
        decoder: Nothing that counts was computed with it yet.
        layout: Where adapters can stand.
        rows_max: Maximum rows of one forward.

    Returns:
        Whether products may have any multiple of `ROWS_STEP` rows.
    """
    shape, rule = decoder.shape, decoder.rule
    like = torch.empty(0, dtype=shape.dtype, device=shape.device)
    distinct = {(product.d_out, product.d_in): product for product in decoder.products()}
    for (d_out, d_in), product in distinct.items():
        count = min(rows_max, HEAD_ROWS_MAX) if d_out == shape.vocab else rows_max
        if not is_invariant(product.compute, d_in, count, like):
            rule.in_blocks = True
    for rank in LORA_RANKS:
        pairs = list(_loras(layout, rank, like))
        if all(forms_agree(*pair) for pair in pairs):
            rule.ranks_fast |= {rank}
        elif not all(_is_parts_invariant(first) for first, _second in pairs):
            rule.in_blocks = True
    return not rule.in_blocks


def is_invariant(compute: Compute, d_in: int, rows_max: int, like: Tensor) -> bool:
    """Whether a product's rows have the same bits at all numbers of rows and at every place.

    Args:
        compute: The product.
        d_in: Size of its rows.
        rows_max: Maximum number of rows in use.
        like: Of the dtype and on the device in use.
    """
    largest = -(-rows_max // ROWS_STEP) * ROWS_STEP
    rows = _random((largest, d_in), like, seed=0)
    whole = compute(rows)
    for count in COUNTS:
        for start in (0, largest - count) if count < largest else ():
            here = slice(start, start + count)
            if not torch.equal(compute(rows[here].contiguous()), whole[here]):
                return False
    return True


def forms_agree(first: SiteLora, second: SiteLora) -> bool:
    """Whether all forms of `SiteLora` give the same bits at all numbers of rows.

    Args:
        first: An adapter.
        second: Another one of the same site, rank and scaling, to stand beside it in a stack.
    """
    fast, stack = RowRule(), LoraStack()
    fast.ranks_fast = frozenset({first.rank})
    adapters = [LoraWeights(0, s.scaling, [[s]], [None], None, 0) for s in (first, second)]
    held = stack.hold(adapters)
    x, y, expected = _parts(first)
    for count in LORA_COUNTS:
        if not torch.equal(first.added(fast, y[:count].clone(), x[:count]), expected[:count]):
            return False
    first.reorder()
    for count in LORA_COUNTS:
        if not torch.equal(first.added(fast, y[:count].clone(), x[:count]), expected[:count]):
            return False
        if count <= WHOLE_ROWS_MAX:
            both_x, both_y = x[:count].repeat(2, 1), y[:count].repeat(2, 1)
            stack.add(0, Site(0), both_x, both_y)
            own = both_y[:count] if held[0].sites[0][0] is first else both_y[count:]
            if not torch.equal(own, expected[:count]):
                return False
    return True


def _is_parts_invariant(site: SiteLora) -> bool:
    """Whether the form by parts gives the same bits at all numbers of rows."""
    x, y, expected = _parts(site)
    for count in LORA_COUNTS:
        if not torch.equal(site.added(RowRule(), y[:count].clone(), x[:count]), expected[:count]):
            return False
    return True


def _parts(site: SiteLora) -> tuple[Tensor, Tensor, Tensor]:
    """Random x and y for a site, and what the form by parts makes of them."""
    d_out = sum(part.shape[1] for part in site.parts)
    x = _random((LORA_COUNTS[-1], len(site.a)), site.a, seed=1)
    y = _random((LORA_COUNTS[-1], d_out), site.a, seed=2)
    return x, y, site.added(RowRule(), y.clone(), x)


def _loras(layout: LoraLayout, rank: int, like: Tensor) -> Iterator[tuple[SiteLora, SiteLora]]:
    """Two adapters of each shape of a site."""
    sites = [site for layer in layout.layers for site in layer.sites if site]
    for d_in, *d_outs in sorted({(site[0].d_in, *(p.d_out for p in site)) for site in sites}):
        a, other = (_random((d_in, rank * len(d_outs)), like, seed=s) for s in (3, 4))
        b = torch.zeros((len(d_outs), rank, sum(d_outs))).to(like)
        place = 0
        for number, d_out in enumerate(d_outs):
            b[number, :, place : place + d_out] = _random((rank, d_out), like, seed=5)
            place += d_out
        b = b.flatten(0, 1)
        yield SiteLora(a, b, d_outs, 2.0), SiteLora(other, b, d_outs, 2.0)


def _random(shape: tuple[int, ...], like: Tensor, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(like)
