"""What a token costs to train, and how much a device can compute: what an MFU is made of.

Of a matrix product a token takes two operations for each weight that it meets. LoRA has no gradient
of those weights, so its way back costs as much as the way there; where all weights are trained it
costs twice as much. Attention of a datum of s tokens takes 4 * layers * width operations for each
of its s (s + 1) / 2 pairs on the way there, twice that on the way back. The work of adapters
themselves, padding, recomputation and replays do not count (PaLM, 2204.02311, appendix B, without
its 6 N where weights are frozen).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tinsmithd.sizes.architecture import Architecture
from tinsmithd.sizes.weights import active_count

PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
}
"""Dense bfloat16, from the makers' data sheets; the first name that the device's name holds."""


@dataclass(frozen=True)
class Work:
    """What one token of a base model costs; all 0 where nobody knows.

    Attributes:
        weights: Weights of matrix products that a token meets, the head's included.
        attention_width: Layers times the width of all query heads.
    """

    weights: int = 0
    attention_width: int = 0

    @classmethod
    def of(cls, model: Architecture) -> "Work":
        """That of an architecture."""
        # The embedding is looked up, not multiplied with; a head that is tied to it is.
        embedding = 0 if model.tied else model.vocab_size * model.hidden_size
        return cls(active_count(model) - embedding, model.layer_count * model.query_size)

    def flops(self, lengths: Sequence[int], *, backward: bool, frozen: bool) -> int:
        """Operations that data of these lengths take.

        Args:
            lengths: Tokens of each.
            backward: Whether with gradients.
            frozen: Whether the base's weights have none.
        """
        ways = (2 if frozen else 3) if backward else 1
        pairs = sum(length * (length + 1) // 2 for length in lengths)
        attention = 4 * self.attention_width * pairs * (3 if backward else 1)
        return 2 * self.weights * sum(lengths) * ways + attention


NO_WORK = Work()
"""Nobody knows."""


def peak_flops(device: str, dtype: str) -> float | None:
    """Operations that a device can make in a second with such weights; None where nobody knows.

    Args:
        device: Its name, as CUDA has it.
        dtype: Of the frozen weights; float32 has no one peak, since settings of torch decide it.
    """
    if dtype != "bfloat16":
        return None
    return next((flops for part, flops in PEAK_FLOPS.items() if part in device), None)
