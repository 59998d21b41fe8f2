"""The layer that makes logits, in float32 whatever dtype the weights have."""

import torch
from torch import Tensor

from tinsmithd.modeling.logits import float_product
from tinsmithd.sampler.engines.transformers.model.linear import Product, RowRule, blocks


class Head:
    """`h W^T` with sums that are never rounded below float32.

    A CPU has no kernel for narrow factors and a wide sum, so there the weight is kept in float32,
    which changes none of its values. It takes twice the memory of one in bfloat16, and a third of
    the time of widening it anew in each call.

    Args:
        weight: `(V, d)`.
        rule: How many rows are given.
    """

    def __init__(self, weight: Tensor, rule: RowRule) -> None:
        self.d_out, self.d_in = weight.shape
        self._rule = rule
        on_cpu = weight.device.type == "cpu"
        self._wide = Product(weight.float(), None, rule) if on_cpu else None
        self._weight = None if on_cpu else weight

    def compute(self, hidden: Tensor) -> Tensor:
        """As a call, whatever the rule says."""
        if self._wide is not None:
            return self._wide.compute(hidden.float())
        assert self._weight is not None
        return float_product(hidden, self._weight)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Map `(N, d)` to float32 `(N, V)`."""
        if not self._rule.in_blocks:
            return self.compute(hidden)
        return torch.cat([self.compute(rows) for rows in blocks(hidden)])
