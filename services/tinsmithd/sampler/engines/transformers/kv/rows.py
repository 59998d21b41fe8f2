"""What the rows of a forward are, and how each kind finds its attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from tinsmithd.sampler.engines.transformers.kv.arenas import View
from tinsmithd.sampler.engines.transformers.kv.attention import (
    BLOCK_KEYS,
    ROWS,
    KeyCounts,
    attend,
    causal_mask,
)
from tinsmithd.sampler.engines.transformers.kv.parts import Prompt, SequenceKv
from tinsmithd.sampler.engines.transformers.model.shape import ModelShape


@dataclass(frozen=True)
class Kernel:
    """What attention of any rows needs to know.

    Attributes:
        shape: Of the model.
        counts: Good numbers of keys.
        same: A row's bits do not depend on the number of rows.
    """

    shape: ModelShape
    counts: KeyCounts
    same: bool

    @property
    def group_rows(self) -> int:
        """Query heads of a key head, and what fills them up to a multiple of `ROWS`."""
        return _up(self.shape.group, ROWS)


class SequenceRows:
    """Rows of sequences that have consecutive slots of an arena.

    Args:
        kernel: How to attend.
        sequences: Theirs, in the order of the rows.
        row: The first of them.
    """

    def __init__(self, kernel: Kernel, sequences: Sequence[SequenceKv], row: int) -> None:
        shape, first, count = kernel.shape, sequences[0], len(sequences)
        self._kernel, self._arena = kernel, first.arena
        self._row, self._count = row, count
        own = [sequence.own for sequence in sequences]
        self._own_N = torch.tensor(own, device=shape.device)
        slots_N = torch.arange(first.slot, first.slot + count, device=shape.device)
        self._at = (slots_N, self._own_N)
        end = kernel.counts.padded(max(own) + 1)
        self._windows = [_narrowing(window, max(own) + 1) for window in shape.windows]
        self._seen: dict[int | None, tuple[list[View], Tensor]] = {}
        for window in set(self._windows):
            start = _first_key(min(own), window)
            views = self._arena.views(first.slot, first.slot + count, start, end)
            mask = causal_mask(self._own_N, start, end, window, shape.dtype)[:, None, None]
            expanded = mask.expand(-1, shape.kv_heads, kernel.group_rows, -1)
            self._seen[window] = (views, expanded)
        self._shared = SharedRows(kernel, sequences) if self._arena.shared else None

    def __call__(self, layer: int, qkv_THD: Tensor) -> Tensor:
        """Write the keys and values of one layer; what the rows' queries find, `(N, heads * D)`."""
        shape = self._kernel.shape
        qkv_NHD = qkv_THD
        if len(qkv_THD) != self._count:
            qkv_NHD = qkv_THD[self._row : self._row + self._count]
        views, mask = self._seen[self._windows[layer]]
        view = views[layer]
        view.to_SCHD.index_put_(self._at, qkv_NHD[:, shape.heads :])
        found, sums = attend(self._queries(qkv_NHD), view.k_NGKD, view.v_NGKD, mask, shape.scaling)
        found = found[:, :, : shape.group]
        if self._shared is not None:
            q_NGgD = qkv_NHD[:, : shape.heads].view(found.shape)
            found = self._shared(layer, q_NGgD, found, sums[:, :, : shape.group])
        return found.reshape(self._count, -1)

    def _queries(self, qkv_NHD: Tensor) -> Tensor:
        """Queries by their key head, filled up to the rows of a product; nobody looks at the rest.

        The heads that follow in memory fill up, which costs nothing: there are keys and values
        behind the last query.
        """
        shape, rows = self._kernel.shape, self._kernel.group_rows
        fill = rows - shape.group
        size = (self._count, shape.kv_heads, rows, shape.head_dim)
        if fill <= 2 * shape.kv_heads:
            row, head, one = qkv_NHD.stride()
            return qkv_NHD.as_strided(size, (row, shape.group * head, head, one))
        q_NHD = qkv_NHD[:, : shape.heads]
        return functional.pad(
            q_NHD.reshape(self._count, shape.kv_heads, shape.group, -1), (0, 0, 0, fill)
        )


class SharedRows:
    """What rows of groups find in the prompts that they share.

    Args:
        kernel: How to attend.
        sequences: Those of the rows.
    """

    def __init__(self, kernel: Kernel, sequences: Sequence[SequenceKv]) -> None:
        shape = kernel.shape
        self._kernel = kernel
        members: dict[Prompt, list[int]] = {}
        for row, sequence in enumerate(sequences):
            members.setdefault(sequence.prompt, []).append(row)
        unit = ROWS // math.gcd(shape.group, ROWS)
        order: list[int] = []
        places = [0] * len(sequences)
        self._groups: list[tuple[Prompt, slice, int, Tensor | None]] = []
        for prompt, rows in members.items():
            count = len(rows) if kernel.same else prompt.reservation.samples
            start = len(order)
            for place, row in enumerate(rows, start):
                places[row] = place
            # Any row fills up; nobody looks at what it finds.
            order += rows + [rows[0]] * (_up(count, unit) - len(rows))
            stacked = slice(start * shape.group, len(order) * shape.group)
            self._groups.append((prompt, stacked, *self._mask(prompt)))
        self._order_M: Tensor | None = None
        self._places_N: Tensor | None = None
        if order != list(range(len(sequences))):
            self._order_M = torch.tensor(order, device=shape.device)
            self._places_N = torch.tensor(places, device=shape.device)

    def _mask(self, prompt: Prompt) -> tuple[int, Tensor | None]:
        """How many keys are read of a prompt, and what hides those behind it."""
        tokens = len(prompt.tokens_P)
        end = self._kernel.counts.padded(tokens)
        if end == tokens:
            return end, None
        last = torch.tensor([tokens - 1], device=self._kernel.shape.device)
        return end, causal_mask(last, 0, end, None, self._kernel.shape.dtype)[None, None]

    def __call__(
        self, layer: int, q_NGgD: Tensor, own_NGgD: Tensor, own_sums_NGg: Tensor
    ) -> Tensor:
        """Join what each row found among its own keys with what it finds in the prompt.

        Args:
            layer: Which.
            q_NGgD: Queries, `(N, kv_heads, group, head_dim)`.
            own_NGgD: What they found among their own keys.
            own_sums_NGg: Log-sum-exp of those scores.
        """
        shape = self._kernel.shape
        if self._order_M is not None:
            q_NGgD = q_NGgD.index_select(0, self._order_M)
        q_GMD = q_NGgD.transpose(0, 1).flatten(1, 2)[None]
        parts = []
        for prompt, stacked, end, mask in self._groups:
            assert prompt.kv_LHCD is not None
            kv_1HKD = prompt.kv_LHCD[layer][None, :, :end]
            q = q_GMD[:, :, stacked]
            if mask is not None:
                mask = mask.expand(1, shape.kv_heads, q.shape[2], end)
            k_1GKD, v_1GKD = kv_1HKD.chunk(2, dim=1)
            parts.append(attend(q, k_1GKD, v_1GKD, mask, shape.scaling))
        found_GMD, sums_GM = (
            parts[0]
            if len(parts) == 1
            else (torch.cat([part[i] for part in parts], dim=2) for i in (0, 1))
        )
        grouped = (shape.kv_heads, -1, shape.group)
        found_NGgD = found_GMD[0].view(*grouped, shape.head_dim).transpose(0, 1)
        sums_NGg = sums_GM[0].view(grouped).transpose(0, 1)
        if self._places_N is not None:
            found_NGgD = found_NGgD.index_select(0, self._places_N)
            sums_NGg = sums_NGg.index_select(0, self._places_N)
        # Two at a time in the last dimension: an element's bits do not depend on how many there
        # are. Each operation rounds once, so that no place in a vector matters.
        weights = functional.softmax(torch.stack((own_sums_NGg, sums_NGg), -1), dim=-1)
        joined = (own_NGgD * weights[..., :1]).add_(found_NGgD * weights[..., 1:])
        return joined.to(shape.dtype)


class PieceRows:
    """Rows of a piece of a prompt.

    Args:
        kernel: How to attend.
        prompt: Whose.
        start: Position of the first row.
        end: Position behind the last.
        row: The first row.
    """

    def __init__(self, kernel: Kernel, prompt: Prompt, start: int, end: int, row: int) -> None:
        shape = kernel.shape
        self._kernel, self._prompt, self._row = kernel, prompt, row
        self._start, self._end = start, end
        # Rows that see few keys need not meet all of the piece's.
        base = start // BLOCK_KEYS * BLOCK_KEYS
        borders = [
            whole + border
            for whole in range(base, end, BLOCK_KEYS)
            for border in kernel.counts.borders
        ]
        cuts = [start, *(border for border in borders if start < border < end), end]
        self._cuts = list(pairwise(cuts))
        self._windows = [_narrowing(window, end) for window in shape.windows]
        self._seen = {
            (cut, window): self._mask(*cut, window)
            for cut in self._cuts
            for window in set(self._windows)
        }

    def _mask(self, start: int, end: int, window: int | None) -> tuple[int, int, Tensor]:
        shape = self._kernel.shape
        first, last = _first_key(start, window), self._kernel.counts.padded(end)
        positions = torch.arange(start, start + _up(end - start, ROWS), device=shape.device)
        mask = causal_mask(positions, first, last, window, shape.dtype)
        return first, last, mask.expand(shape.kv_heads, shape.group, -1, -1)

    def __call__(self, layer: int, qkv_THD: Tensor) -> Tensor:
        """Write the keys and values of one layer; what the rows' queries find, `(N, heads * D)`."""
        shape, window = self._kernel.shape, self._windows[layer]
        assert self._prompt.kv_LHCD is not None
        kv_HCD = self._prompt.kv_LHCD[layer]
        rows = slice(self._row, self._row + self._end - self._start)
        kv_HCD[:, self._start : self._end] = qkv_THD[rows, shape.heads :].transpose(0, 1)
        parts = []
        for cut in self._cuts:
            first, last, mask = self._seen[cut, window]
            start, count = self._row + cut[0] - self._start, cut[1] - cut[0]
            # What follows fills up; nobody looks at what it finds.
            q_MHD = qkv_THD[start : start + mask.shape[2], : shape.heads]
            if len(q_MHD) < mask.shape[2]:
                q_MHD = functional.pad(q_MHD, (0, 0, 0, 0, 0, mask.shape[2] - len(q_MHD)))
            q_MGgD = q_MHD.view(-1, shape.kv_heads, shape.group, shape.head_dim)
            read = kv_HCD[:, None, first:last].expand(-1, shape.group, -1, -1)
            k_GgKD, v_GgKD = read.chunk(2)
            found, _sums = attend(q_MGgD.permute(1, 2, 0, 3), k_GgKD, v_GgKD, mask, shape.scaling)
            parts.append(found[:, :, :count].permute(2, 0, 1, 3).reshape(count, -1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def join(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
    """Queries, keys and values as one, `(T, heads + 2 * kv_heads, D)`.

    A copy only where they do not lie beside each other already, as in the result of one product.
    """
    step = q_THD.stride()
    heads, kv_heads, head_dim = q_THD.shape[1], *k_TGD.shape[1:]
    head_bytes = head_dim * q_THD.element_size()
    if (
        step == k_TGD.stride() == v_TGD.stride()
        and step[0] >= (heads + 2 * kv_heads) * head_dim
        and step[1:] == (head_dim, 1)
        and k_TGD.data_ptr() - q_THD.data_ptr() == heads * head_bytes
        and v_TGD.data_ptr() - k_TGD.data_ptr() == kv_heads * head_bytes
    ):
        return q_THD.as_strided((len(q_THD), heads + 2 * kv_heads, head_dim), step)
    return torch.cat((q_THD, k_TGD, v_TGD), dim=1)


def _first_key(position: int, window: int | None) -> int:
    """The first key that any token from a position on may see, at a block's border.

    Blocks keep their borders: a row's sums are split where they are for every other row.
    """
    if window is None:
        return 0
    return max(0, position - window + 1) // BLOCK_KEYS * BLOCK_KEYS


def _narrowing(window: int | None, tokens: int) -> int | None:
    """A window, or None where it hides nothing of so many tokens."""
    return None if window is None or window >= tokens else window


def _up(count: int, unit: int) -> int:
    """The least multiple of a unit that is not less than `count`."""
    return -(-count // unit) * unit
