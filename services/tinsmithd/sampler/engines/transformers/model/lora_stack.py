"""The weights of several adapters of one rank in a stack, so that one product takes them all."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tinsmithd.sampler.engines.transformers.model.lora_layout import Site
from tinsmithd.sampler.engines.transformers.model.lora_weights import LoraWeights, SiteLora

StackKey = tuple[int, float]
"""What the adapters of a stack have in common: their padded rank, and their scaling."""


class LoraStack:
    """Copies of the weights of adapters of one rank and scaling, one above the other.

    Only the thread that computes uses it. An adapter that comes or goes costs a copy of one.
    """

    def __init__(self) -> None:
        self._held: list[LoraWeights] = []
        self._capacity = 0
        self._stacked: list[list[SiteLora | None]] = []
        """Per layer and site: A `(capacity, d_in, parts * rank)`, and per part B `(capacity, rank,
        d_out)`; None where no adapter has had any."""

    def hold(self, adapters: Sequence[LoraWeights]) -> list[LoraWeights]:
        """Hold exactly these adapters, all different; returns them in the order of the stack."""
        wanted = {id(adapter): adapter for adapter in adapters}
        if len(wanted) > self._capacity:
            self._capacity = 1 << (len(wanted) - 1).bit_length()
            self._held, self._stacked = [], []
        new = [a for a in adapters if id(a) not in set(map(id, self._held))]
        place = 0
        while place < len(self._held):
            if id(self._held[place]) in wanted:
                place += 1
                continue
            # Another takes the place of one that goes: a new one, else the last.
            last = self._held.pop() if not new else None
            if last is None:
                self._held[place] = new.pop()
            elif place < len(self._held):
                self._held[place] = last
            else:
                break
            self._copy(place)
        for adapter in new:
            self._held.append(adapter)
            self._copy(len(self._held) - 1)
        return list(self._held)

    def add(self, layer: int, site: Site, x: Tensor, y: Tensor) -> bool:
        """Add what the adapters make of their rows.

        Args:
            layer: Number of the layer.
            site: The product.
            x: `(n * T, d_in)`: the same number of rows for each adapter, in the order of the stack.
            y: `(n * T, d_out)`; changed in place.

        Returns:
            False where no adapter adds anything.
        """
        lora = self._stacked[layer][site]
        if lora is None:
            return False
        count = len(self._held)
        rows_y = y.view(count, len(y) // count, -1)
        update = torch.bmm(x.view(count, len(x) // count, -1), lora.a[:count])
        if len(lora.b) == 1:
            rows_y.baddbmm_(update, lora.b[0][:count], alpha=lora.scaling)
            return True
        sizes = [b.shape[2] for b in lora.b]
        updates = update.split(lora.b[0].shape[1], 2)
        for part, own, b in zip(rows_y.split(sizes, 2), updates, lora.b, strict=True):
            part.baddbmm_(own, b[:count], alpha=lora.scaling)
        return True

    def _copy(self, place: int) -> None:
        """Copy the weights of the adapter that is held at a place."""
        adapter = self._held[place]
        if not self._stacked:
            self._stacked = [[None] * len(layer) for layer in adapter.sites]
        for layer, stacked in zip(adapter.sites, self._stacked, strict=True):
            for site, lora in enumerate(layer):
                if stacked[site] is None and lora is not None:
                    stacked[site] = SiteLora(
                        self._zeros(lora.a), tuple(map(self._zeros, lora.b)), lora.scaling
                    )
                room = stacked[site]
                if room is None:
                    continue
                for target, source in zip(
                    room.tensors(), lora.tensors() if lora else [None] * 9, strict=False
                ):
                    target[place].zero_() if source is None else target[place].copy_(source)

    def _zeros(self, like: Tensor) -> Tensor:
        return like.new_zeros((self._capacity, *like.shape))
