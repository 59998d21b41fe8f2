"""Imported only where the caller uses torch."""

from typing import Any

import torch
from numpy.typing import NDArray


class TorchTensor(torch.Tensor):
    """A result for a caller who works with torch: a tensor that also converts."""

    # Whatever is computed from it is a plain tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, array: NDArray[Any]) -> "TorchTensor":
        """Make one of an array, which is copied."""
        return torch.from_numpy(array.copy()).as_subclass(cls)

    def to_torch(self) -> torch.Tensor:
        """As a plain tensor."""
        return self.as_subclass(torch.Tensor)

    def to_numpy(self) -> NDArray[Any]:
        """As an array that shares the memory."""
        return self.as_subclass(torch.Tensor).numpy()
