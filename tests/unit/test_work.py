"""What a token costs, by hand; and what is known of peaks."""

from pathlib import Path

import pytest

from tinsmithd import sizes
from tinsmithd.sizes import Work, read_architecture

SHAPES = Path(__file__).parents[1] / "architectures"


def test_weights_are_those_that_a_token_is_multiplied_with() -> None:
    """Qwen3-8B: 36 layers of 4096, 32 and 8 heads of 128, an MLP of 12288; a head of its own."""
    work = Work.of(read_architecture(SHAPES / "Qwen3-8B.json"))
    attention = 4096 * 128 * 2 * (32 + 8)
    matrices = 36 * (attention + 3 * 4096 * 12_288) + 4096 * 151_936
    assert work.weights == pytest.approx(matrices, rel=1e-4)  # and norms, which are vectors
    assert work.attention_width == 36 * 32 * 128


def test_of_experts_those_count_that_a_token_passes_through() -> None:
    """Qwen3-30B-A3B: 128 experts of 768, of which 8 are passed through."""
    work = Work.of(read_architecture(SHAPES / "Qwen3-30B-A3B.json"))
    attention = 2048 * 128 * 2 * (32 + 4)
    mlp = 3 * 2048 * 768 * 8 + 2048 * 128
    assert work.weights == pytest.approx(48 * (attention + mlp) + 2048 * 151_936, rel=1e-4)


def test_operations_by_hand() -> None:
    """Forward 2 N, LoRA 4 N, all weights 6 N; attention once there and twice back, of pairs."""
    work, lengths = Work(1000, 16), [1, 3]
    pairs = 1 + 6
    assert work.flops(lengths, backward=False, frozen=True) == 2000 * 4 + 64 * pairs
    assert work.flops(lengths, backward=True, frozen=True) == 4000 * 4 + 3 * 64 * pairs
    assert work.flops(lengths, backward=True, frozen=False) == 6000 * 4 + 3 * 64 * pairs
    assert sizes.NO_WORK.flops(lengths, backward=True, frozen=True) == 0


@pytest.mark.parametrize(
    ("device", "dtype", "peak"),
    [
        ("NVIDIA H200", "bfloat16", 989e12),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA L40S", "bfloat16", 362e12),
        ("NVIDIA H200", "float32", None),
        ("cpu", "bfloat16", None),
        ("", "bfloat16", None),
    ],
)
def test_a_peak_is_known_or_not_said(device: str, dtype: str, peak: float | None) -> None:
    assert sizes.peak_flops(device, dtype) == peak
