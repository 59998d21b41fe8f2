"""Pending gradients, in one flat buffer on this rank."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


class Layout:
    """Where each parameter of a model stands in a flat buffer."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.names = list(parameters)
        self.shapes = [parameter.shape for parameter in parameters.values()]
        self._counts = [parameter.numel() for parameter in parameters.values()]
        self.count = sum(self._counts)
        """Number of elements, without the padding to equal slices."""

    def views(self, flat: Tensor) -> list[Tensor]:
        """Views of the parameters in a buffer of at least `count` elements."""
        parts = torch.split(flat[: self.count], self._counts)
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def by_name(self, flat: Tensor) -> dict[str, np.ndarray]:
        """The same for a buffer in host memory, as arrays by name."""
        return {n: v.numpy() for n, v in zip(self.names, self.views(flat), strict=True)}

    def flatten(self, arrays: Mapping[str, np.ndarray]) -> Tensor:
        """One flat float32 tensor of `count` elements."""
        flat = np.concatenate([np.asarray(arrays[n], np.float32).reshape(-1) for n in self.names])
        return torch.from_numpy(flat)


class PendingGradients:
    """float32, summed over batches, never over ranks; no buffer is held while none are pending."""

    def __init__(self) -> None:
        self._flat: Tensor | None = None
        self._savepoint: tuple[Tensor | None] | None = None

    def add(self, gradients: Sequence[Tensor | None], layout: Layout, padded_count: int) -> None:
        """Add one gradient per parameter, in the layout's order."""
        device = next((g.device for g in gradients if g is not None), None)
        flat = self.buffer(padded_count, device)
        pairs = [
            (view, gradient)
            for view, gradient in zip(layout.views(flat), gradients, strict=True)
            if gradient is not None
        ]
        if pairs:
            torch._foreach_add_([view for view, _ in pairs], [gradient for _, gradient in pairs])

    def buffer(self, padded_count: int, device: torch.device | None) -> Tensor:
        """The buffer, to add to; zeros where nothing is pending."""
        if self._flat is None:
            self._flat = torch.zeros(padded_count, device=device)
        return self._flat

    def take(self, padded_count: int, device: torch.device) -> Tensor:
        """Hand the buffer out, zeros where nothing is pending, and hold nothing any more."""
        flat = self._flat
        self.clear()
        return torch.zeros(padded_count, device=device) if flat is None else flat

    def clear(self) -> None:
        """Drop everything, and what `save` remembered."""
        self._flat = self._savepoint = None

    def copy(self) -> Tensor | None:
        """A copy of the buffer, for `put_back`."""
        return None if self._flat is None else self._flat.clone()

    def put_back(self, copy: Tensor | None) -> None:
        """Go back to a copy."""
        self._flat = copy

    def save(self) -> None:
        """Remember what is pending now."""
        self._savepoint = (self.copy(),)

    def roll_back(self) -> None:
        """Go back to what `save` remembered, and forget it."""
        if self._savepoint is not None:
            (self._flat,) = self._savepoint
            self._savepoint = None

    def all_finite(self) -> bool:
        """Whether all elements on this rank are finite."""
        if self._flat is None:
            return True
        # One pass: a sum is finite only if all its elements are. A second pass tells finite
        # elements that overflow apart; both of its results are NaN if an element is.
        if bool(self._flat.sum().isfinite()):
            return True
        low, high = torch.aminmax(self._flat)
        return bool(low.isfinite() & high.isfinite())

    def move(self, device: torch.device) -> None:
        """Hold everything on another device."""
        if self._flat is not None:
            self._flat = self._flat.to(device)
        if self._savepoint is not None and self._savepoint[0] is not None:
            self._savepoint = (self._savepoint[0].to(device),)
