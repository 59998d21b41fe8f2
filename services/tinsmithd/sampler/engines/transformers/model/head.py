"""The layer that makes logits, in float32 whatever dtype the weights have."""

import torch
from torch import Tensor

from tinsmithd.modeling.logits import float_product
from tinsmithd.sampler.engines.transformers.model.linear import Product, RowRule


class Head:
    """`h W^T` with sums that are never rounded below float32.

    Args:
        weight: `(V, d)`.
        rule: How many rows are given.
    """

    def __init__(self, weight: Tensor, rule: RowRule) -> None:
        self.d_out, self.d_in = weight.shape
        self._weight = weight
        self._product = Product(weight, None, rule) if weight.dtype == torch.float32 else None

    def compute(self, hidden: Tensor) -> Tensor:
        if self._product is not None:
            return self._product.compute(hidden)
        return float_product(hidden, self._weight)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Map `(N, d)` to float32 `(N, V)`."""
        return self.compute(hidden)
