"""The weights of several adapters of one rank in a stack, so that one product takes them all."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from tinsmithd.sampler.engines.transformers.model.lora_layout import Site
from tinsmithd.sampler.engines.transformers.model.lora_weights import LoraWeights
from tinsmithd.sampler.engines.transformers.model.site_lora import SiteLora

StackKey = tuple[int, float]
"""What the adapters of a stack have in common: their padded rank, and their scaling."""

STACKS_MAX = 4
"""Maximum stacks that are kept, since nothing bounds the number of ranks and scalings."""


class LoraStacks:
    """The stacks that were used last, by what their adapters have in common."""

    def __init__(self) -> None:
        self._stacks: OrderedDict[StackKey, LoraStack] = OrderedDict()

    def of(self, key: StackKey) -> "LoraStack":
        """The stack of a key, new if it is not kept."""
        stack = self._stacks.setdefault(key, LoraStack())
        self._stacks.move_to_end(key)
        if len(self._stacks) > STACKS_MAX:
            self._stacks.popitem(last=False)
        return stack


class LoraStack:
    """Copies of the weights of adapters of one rank and scaling, one above the other.

    Only the thread that computes uses it. An adapter that comes or goes costs a copy of one.
    """

    def __init__(self) -> None:
        self._held: list[LoraWeights] = []
        self._capacity = 0
        self._stacked: list[list[tuple[Tensor, ...] | None]] = []
        """Per layer and site: A `(capacity, d_in, parts * rank)`, then per part B `(capacity, rank,
        d_out)`; None where no adapter has had any."""
        self._scaling = 1.0

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
        stacked = self._stacked[layer][site]
        if stacked is None:
            return False
        count = len(self._held)
        a, *parts = stacked
        rows_y = y.view(count, len(y) // count, -1)
        update = torch.bmm(x.view(count, len(x) // count, -1), a[:count])
        if len(parts) == 1:
            rows_y.baddbmm_(update, parts[0][:count], alpha=self._scaling)
            return True
        updates = update.split_with_sizes([b.shape[1] for b in parts], 2)
        own_y = rows_y.split_with_sizes([b.shape[2] for b in parts], 2)
        for part, own, b in zip(own_y, updates, parts, strict=True):
            part.baddbmm_(own, b[:count], alpha=self._scaling)
        return True

    def _copy(self, place: int) -> None:
        """Copy the weights of the adapter that is held at a place."""
        adapter = self._held[place]
        self._scaling = adapter.scaling
        if not self._stacked:
            self._stacked = [[None] * len(layer) for layer in adapter.sites]
        for layer, stacked in zip(adapter.sites, self._stacked, strict=True):
            for site, lora in enumerate(layer):
                room = stacked[site]
                if lora is not None:
                    room = stacked[site] = room or self._room(lora)
                    for target, source in zip(room, (lora.a, *lora.parts), strict=True):
                        target[place].copy_(source)
                elif room is not None:
                    for target in room:
                        target[place].zero_()

    def _room(self, like: SiteLora) -> tuple[Tensor, ...]:
        weights = (like.a, *like.parts)
        return tuple(w.new_zeros((self._capacity, *w.shape)) for w in weights)
