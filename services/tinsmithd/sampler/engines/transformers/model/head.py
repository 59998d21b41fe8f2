"""The layer that makes logits, in float32 whatever dtype the weights have."""

from typing import Any

import torch
from torch import Tensor

from tinsmithd.modeling.logits import float_product
from tinsmithd.sampler.engines.transformers.model.linear import Compute, Product, Rows


class Head:
    """`h W^T` with sums that are never rounded below float32.

    It has two forms, whose last bits differ, so each has rows of its own: those that a token is
    drawn from, and those of prompts that are scored.

    - _Scores_ have many rows, and multiplying costs most. A CPU has no kernel that is given factors
      in bfloat16 and gives a wide sum, so there the weight is kept in float32, which changes none
      of its values, and oneDNN may take the factors for the bfloat16 that they are: with AMX that
      halves the time.
    - _Draws_ have few, and reading the weight costs most. Where float16 holds every value of a
      bfloat16 weight, FBGEMM reads it in that, half of float32, and sums in float32.

    Args:
        weight: `(V, d)`.

    Attributes:
        d_out, d_in: The weight's sizes.
        compute: The form of scores, of any number of rows, whose bits depend on it.
        compute_few: The form of draws, where it has any number of rows; None: as scores.
    """

    def __init__(self, weight: Tensor) -> None:
        self.d_out, self.d_in = weight.shape
        self.compute: Compute
        if weight.device.type == "cpu":
            wide = Product(weight.float(), None)
            narrow = weight.dtype == torch.bfloat16
            self.compute = lambda hidden: _of_many(wide, hidden, narrow=narrow)
        else:
            self.compute = lambda hidden: float_product(hidden, weight)
        self.compute_few = _of_few(weight)

    def __call__(self, hidden: Tensor, rows: Rows) -> Tensor:
        """Map all rows, `(N, d)`, to the scores' float32 `(N, V)`."""
        return rows.product(self.compute, hidden)


def _of_many(wide: Product, hidden: Tensor, *, narrow: bool) -> Tensor:
    """The product with a weight in float32, whose values are those of bfloat16 where `narrow`."""
    if not narrow:
        return wide.compute(hidden.float())
    # It holds for all threads of the process, of which one computes at a time.
    onednn: Any = torch.backends.mkldnn
    before = onednn.matmul.fp32_precision
    onednn.matmul.fp32_precision = "bf16"
    try:
        return wide.compute(hidden.float())
    finally:
        onednn.matmul.fp32_precision = before


def _of_few(weight: Tensor) -> Compute | None:
    """The product with a weight in float16, where that has the same values and FBGEMM is there."""
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return None
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return None
    if not torch.equal(weight.half().to(weight.dtype), weight):
        return None
    packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)
    product = torch.ops.quantized.linear_dynamic_fp16

    def compute(hidden: Tensor) -> Tensor:
        found: Tensor = product(hidden.float(), packed)
        return found

    return compute
