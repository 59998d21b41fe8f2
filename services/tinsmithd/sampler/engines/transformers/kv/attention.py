"""The attention kernel, and which shapes leave a row's bits alone.

On a CPU the kernel reads keys in blocks of 512 and multiplies with whatever BLAS torch has. Masked
keys add exact zeros. What could still change a row's bits is how BLAS splits a sum: by the number
of keys in a block (MKL splits 193 to 383 of them in halves) and for the rows that remain of a
multiple of four. So queries come in multiples of `ROWS`, and keys in the numbers that a probe found
to be without effect. Then a query has the same bits alone, among neighbours, in a group that shares
its prompt, and within a long piece of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

BLOCK_KEYS = 512
"""Keys that the CPU's kernel reads together."""

KEYS_STEP = 32
"""Numbers of keys are multiples of this: whole vectors of every instruction set."""

ROWS = 4
"""Queries of one product are a multiple of this."""

PROBE_ROWS = (4, 8, 12, 32, 36, 64, 192, 256, 768)
"""Rows at which the probe compares: the kernel's own blocks of queries, and between them."""


def attend(
    q_BHMD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, mask_BHMK: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention of queries over keys.

    Args:
        q_BHMD: Queries.
        k_BHKD: Keys, of the same type; any strides but the last.
        v_BHKD: Values, likewise.
        mask_BHMK: Added to the scores, of the same type: 0 or minus infinity. None: see all.
        scaling: Factor on the scores.

    Returns:
        `(B, H, M, D)`, and the float32 log-sum-exp of each query's scores `(B, H, M)`.
    """
    if q_BHMD.device.type == "cpu":
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BHMD, k_BHKD, v_BHKD, 0.0, False, attn_mask=mask_BHMK, scale=scaling
        )
        # The kernel's sums are (B, M, H) in memory, and say so.
        return found[0], found[1]
    return attend_plainly(q_BHMD, k_BHKD, v_BHKD, mask_BHMK, scaling)


def attend_plainly(
    q_BHMD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, mask_BHMK: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """As `attend`, by two products and a softmax: for devices whose kernels keep no sums."""
    scores = (q_BHMD @ k_BHKD.transpose(-1, -2)).float() * scaling
    if mask_BHMK is not None:
        scores = scores + mask_BHMK
    sums = scores.logsumexp(-1)
    weights = functional.softmax(scores, dim=-1).to(v_BHKD.dtype)
    return weights @ v_BHKD, sums


class KeyCounts:
    """Numbers of keys at which a row's bits do not depend on how many there are.

    Args:
        within_block: Those that may be read of a block, ascending; the last is the whole block.
    """

    def __init__(self, within_block: Iterable[int]) -> None:
        self._counts = tuple(within_block)
        assert self._counts[-1] == BLOCK_KEYS
        first, second = BLOCK_KEYS * 3 // 8, BLOCK_KEYS * 3 // 4
        self.borders = tuple(sorted({self.padded(first), self.padded(second), BLOCK_KEYS}))
        """Where a long piece of a prompt is cut, within a block, so as to read fewer keys."""

    def padded(self, keys: int) -> int:
        """The least number of keys to read where `keys` of them count."""
        whole = (keys - 1) // BLOCK_KEYS * BLOCK_KEYS
        return whole + next(count for count in self._counts if count >= keys - whole)


def probe(
    dtype: torch.dtype, device: torch.device, head_dim: int, rows: int, scaling: float
) -> tuple[KeyCounts, bool]:
    """Find out what this machine's kernel does.

    Args:
        dtype: Of queries, keys and values.
        device: Where they are.
        head_dim: Size of a head.
        rows: Queries of one sequence in one product.
        scaling: Factor on the scores.

    Returns:
        Good numbers of keys, and whether a row's bits are the same at all `PROBE_ROWS`. Where even
        rows of one product differ no number is good: whole blocks, False. On other devices than a
        CPU nothing is known: all multiples, False.
    """
    steps = range(KEYS_STEP, BLOCK_KEYS + 1, KEYS_STEP)
    if device.type != "cpu":
        return KeyCounts(steps), False
    keys, values, query = _cancelling(dtype, head_dim)
    good, same = set(steps), True
    for whole in (0, BLOCK_KEYS):
        lengths = [whole + step for step in steps]
        found = [_probed(query, keys, values, lengths, n, rows, scaling) for n in lengths]
        for i, step in enumerate(steps):
            # Row j counts the first lengths[j] keys, and the last product reads the whole block.
            equal = (torch.equal(found[i][j], found[-1][j]) for j in range(i + 1))
            if not all(equal):
                good.discard(step)
        for count in (n for n in PROBE_ROWS if n != rows):
            other = _probed(query, keys, values, lengths[3::4], lengths[-1], count, scaling)
            same = same and all(map(torch.equal, other, found[-1][3::4]))
    return KeyCounts(sorted(good | {BLOCK_KEYS})), same


def _cancelling(dtype: torch.dtype, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and a query whose sums are all rounding: pairs of keys cancel each other."""
    dice = torch.Generator().manual_seed(0)
    count, pair = 2 * BLOCK_KEYS, KEYS_STEP // 2
    keys = torch.randn((count // KEYS_STEP, 1, pair, head_dim), generator=dice)
    # Values of many magnitudes, so that nearly every addition rounds.
    scale = 2.0 ** torch.randint(-10, 11, keys.shape, generator=dice)
    values = torch.randn(keys.shape, generator=dice) * scale
    query = torch.randn((1, 1, 1, head_dim), generator=dice)
    keys, values = torch.cat([keys, keys], 1), torch.cat([values, -values], 1)
    keys, values = (tensor.reshape(1, 1, count, head_dim).to(dtype) for tensor in (keys, values))
    return keys, values, query.to(dtype)


def _probed(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: list[int],
    read: int,
    rows: int,
    scaling: float,
) -> list[Tensor]:
    """For each length that is not above `read`: what one of `rows` equal queries finds and sums."""
    counted = [min(length, read) for length in lengths]
    batch = len(counted)
    mask = causal_mask(torch.tensor(counted) - 1, 0, read, None, query.dtype)
    q = query.expand(batch, 1, rows, query.shape[-1])
    k, v = (tensor[:, :, :read].expand(batch, 1, read, -1) for tensor in (keys, values))
    out, sums = attend(q, k, v, mask[:, None, None].expand(batch, 1, rows, read), scaling)
    both = torch.cat([out.float(), sums.reshape(batch, 1, rows, 1)], dim=-1)
    # Every row must be as the first.
    same = (both == both[:, :, :1]).all(dim=-1).all(dim=-1)
    both = torch.where(same[..., None, None], both, torch.nan)
    return list(both[:, 0, 0])


def causal_mask(
    positions_N: Tensor, first: int, end: int, window: int | None, dtype: torch.dtype
) -> Tensor:
    """What is added to the scores of queries at some positions over the keys `[first, end)`.

    Args:
        positions_N: Position of each query.
        first: Position of the first key.
        end: Position behind the last.
        window: Tokens that a token sees, itself included; None: all before it.
        dtype: Of the mask.

    Returns:
        `(N, end - first)`: 0 where the key is seen, else minus infinity.
    """
    columns = torch.arange(first, end, device=positions_N.device)
    hidden = columns > positions_N[:, None]
    if window is not None:
        hidden |= columns <= positions_N[:, None] - window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return mask.masked_fill_(hidden, -torch.inf)
