"""Slots for the KV of sequences: those of like length beside each other."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinsmithd.sampler.engines.transformers.model.shape import ModelShape

SHRINK_RATIO = 4
"""An arena of more slots than this times its sequences gives half of them back."""
VIEWS_MAX = 64
"""Views of an arena that are kept."""


class View(NamedTuple):
    """One layer of some slots.

    Attributes:
        to_SCHD: All slots, for new keys and values: `(slots, capacity, 2 * kv_heads, head_dim)`.
        k_NGKD: Keys of some slots, `(N, kv_heads, K, head_dim)`.
        v_NGKD: Values, likewise.
    """

    to_SCHD: Tensor
    k_NGKD: Tensor
    v_NGKD: Tensor


@dataclass(eq=False, kw_only=True)
class Holder:
    """Who has a slot.

    Attributes:
        own: Tokens whose KV is in its slot.
        arena: Where its slot is.
        slot: Which.
        closed: Its room was given back.
    """

    own: int
    arena: Arena = field(repr=False)
    slot: int = 0
    closed: bool = False


class Arena:
    """Slots of one capacity. The open sequences fill the first ones, so one product reads them all.

    Keys and values behind a sequence's length, and in slots that nobody has, are zeros: what a
    sequence left, be it NaN, must not reach the next one through a masked key.

    Args:
        shape: Of the model.
        capacity: Tokens of a slot.
        shared: Its sequences have their prompt elsewhere.
    """

    def __init__(self, shape: ModelShape, capacity: int, shared: bool) -> None:
        self._shape = shape
        self.capacity = capacity
        self.shared = shared
        self.sequences: list[Holder] = []
        """Who has each slot; closed ones until `compact`."""
        self.slots = 0
        """Slots for which there is memory."""
        self.kv_SHCD: list[Tensor] = []
        """For each layer keys, then values: `(slots, 2 * kv_heads, capacity, head_dim)`."""
        self._views: dict[tuple[int, int, int, int], list[View]] = {}

    def add(self, sequence: Holder) -> None:
        """Give a sequence the next slot; there must be one."""
        assert len(self.sequences) < self.slots
        sequence.arena, sequence.slot = self, len(self.sequences)
        self.sequences.append(sequence)

    def resize(self, slots: int) -> None:
        """Have memory for so many slots, at least for those that are in use."""
        used = len(self.sequences)
        assert slots >= used
        if slots == self.slots:
            return
        self._views.clear()
        shape = (slots, 2 * self._shape.kv_heads, self.capacity, self._shape.head_dim)
        if not slots:
            self.kv_SHCD = []
        elif not self.kv_SHCD:
            self.kv_SHCD = [zeros(shape, self._shape) for _layer in range(self._shape.layers)]
        else:
            longest = max((holder.own for holder in self.sequences), default=0)
            # A layer at a time: the rest is not there twice.
            for layer, old in enumerate(self.kv_SHCD):
                self.kv_SHCD[layer] = zeros(shape, self._shape)
                self.kv_SHCD[layer][:used, :, :longest] = old[:used, :, :longest]
        self.slots = slots

    def compact(self) -> None:
        """Move the last open sequences into the slots of those that were closed."""
        if all(sequence.closed for sequence in self.sequences):
            self.sequences.clear()
        while any(sequence.closed for sequence in self.sequences):
            last = self.sequences.pop()
            if last.closed:
                self._wipe(last.slot, 0, last.own)
                continue
            hole = next(sequence for sequence in self.sequences if sequence.closed)
            for tensor in self.kv_SHCD:
                tensor[hole.slot, :, : last.own] = tensor[last.slot, :, : last.own]
            self._wipe(last.slot, 0, last.own)
            self._wipe(hole.slot, last.own, hole.own)
            self.sequences[hole.slot] = last
            last.slot = hole.slot
        if len(self.sequences) * SHRINK_RATIO < self.slots:
            self.resize(2 * len(self.sequences))

    def views(self, first: int, last: int, start: int, end: int) -> list[View]:
        """What rows of the slots `[first, last)` write to and read, the keys `[start, end)`.

        Steps that follow each other mostly ask for the same: it is kept.
        """
        key = (first, last, start, end)
        if key not in self._views:
            if len(self._views) >= VIEWS_MAX:
                self._views.clear()
            heads = self._shape.kv_heads
            self._views[key] = [
                View(
                    kv.transpose(1, 2),
                    kv[first:last, :heads, start:end],
                    kv[first:last, heads:, start:end],
                )
                for kv in self.kv_SHCD
            ]
        return self._views[key]

    def _wipe(self, slot: int, start: int, end: int) -> None:
        # A forward that was not committed has written one token more.
        end = min(end + 1, self.capacity)
        if start < end:
            for tensor in self.kv_SHCD:
                tensor[slot, :, start:end] = 0


def zeros(shape: tuple[int, ...], model: ModelShape) -> Tensor:
    """Zeros of the model's type, on its device; on a CPU memory is touched only when it is used."""
    # Not a tensor of inference mode: those may be written to nowhere else.
    with torch.inference_mode(False):
        if model.device.type != "cpu":
            return torch.zeros(shape, dtype=model.dtype, device=model.device)
        raw = torch.from_numpy(np.zeros(math.prod(shape) * model.dtype.itemsize, np.uint8))
        return raw.view(model.dtype).view(shape)
