"""Finds out whether the bits of a product's row depend on how many rows there are.

Which kernel a library takes, and in which order that sums, is nowhere promised, so it is tried: on
the shapes in use, in the form in use, at many numbers of rows.
"""

import torch
from torch import Tensor

from tinsmithd.sampler.engines.transformers.model.decoder import Decoder
from tinsmithd.sampler.engines.transformers.model.linear import ROWS_STEP, Compute

COUNTS = (4, 8, 12, 16, 20, 24, 28, 32, 36, 48, 60, 64, 96, 128, 200, 256)
"""Numbers of rows that are tried, besides the largest in use."""

HEAD_ROWS_MAX = 64
"""Rows that are tried on the head, which is the largest product."""


@torch.inference_mode()
def is_invariant(compute: Compute, d_in: int, rows_max: int, like: Tensor) -> bool:
    """Whether a product's rows have the same bits at all numbers of rows and at every place.

    Args:
        compute: The product.
        d_in: Size of its rows.
        rows_max: Maximum number of rows in use.
        like: Of the dtype and on the device in use.
    """
    largest = -(-rows_max // ROWS_STEP) * ROWS_STEP
    counts = [*(count for count in COUNTS if count < largest), largest]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(counts[-1], d_in, generator=generator).to(like)
    whole = compute(rows)
    for count in counts[:-1]:
        for start in (0, counts[-1] - count):
            here = slice(start, start + count)
            if not torch.equal(compute(rows[here].contiguous()), whole[here]):
                return False
    return True


def check_rows(decoder: Decoder, rows_max: int) -> bool:
    """Whether the rows of a decoder's products do not depend on how many there are.

    Args:
        decoder: Any.
        rows_max: Maximum rows of one forward.
    """
    like = torch.empty(0, dtype=decoder.shape.dtype, device=decoder.shape.device)
    distinct = {(product.d_out, product.d_in): product for product in decoder.products()}
    for (d_out, d_in), product in distinct.items():
        count = min(rows_max, HEAD_ROWS_MAX) if d_out == decoder.shape.vocab else rows_max
        if not is_invariant(product.compute, d_in, count, like):
            return False
    return True
