"""Gradients that wait for a step, in one flat buffer on this rank."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tinsmithd.trainer.engines.zero_adapter import Layout


class WaitingGradients:
    """float32, summed over calls, never over ranks; nothing is held while nothing waits."""

    def __init__(self) -> None:
        self._flat: Tensor | None = None
        self._savepoint: tuple[Tensor | None] | None = None

    def add(self, gradients: Sequence[Tensor | None], layout: Layout, padded_count: int) -> None:
        """Add one gradient per parameter, in the layout's order."""
        flat = self._flat
        if flat is None:
            device = next((g.device for g in gradients if g is not None), None)
            flat = self._flat = torch.zeros(padded_count, device=device)
        pairs = [
            (view, gradient)
            for view, gradient in zip(layout.views(flat), gradients, strict=True)
            if gradient is not None
        ]
        if pairs:
            torch._foreach_add_([view for view, _ in pairs], [gradient for _, gradient in pairs])

    def take(self, padded_count: int, device: torch.device) -> Tensor:
        """Hand the buffer out, zeros where nothing waits, and hold nothing any more."""
        flat = self._flat
        self.clear()
        return torch.zeros(padded_count, device=device) if flat is None else flat

    def clear(self) -> None:
        """Nothing waits any more, and there is nothing to go back to."""
        self._flat = self._savepoint = None

    def copy(self) -> Tensor | None:
        """What waits, for `put_back`."""
        return None if self._flat is None else self._flat.clone()

    def put_back(self, copy: Tensor | None) -> None:
        """Go back to a copy."""
        self._flat = copy

    def save(self) -> None:
        """Remember what waits now."""
        self._savepoint = (self.copy(),)

    def roll_back(self) -> None:
        """Go back to what `save` remembered, and forget it."""
        if self._savepoint is not None:
            (self._flat,) = self._savepoint
            self._savepoint = None

    def move(self, device: torch.device) -> None:
        """Hold everything on another device."""
        if self._flat is not None:
            self._flat = self._flat.to(device)
        if self._savepoint is not None and self._savepoint[0] is not None:
            self._savepoint = (self._savepoint[0].to(device),)
