"""Packed attention on a GPU: the kernel that serves there against the loop."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.sides import Ours, Settings
from data import make_data
from tinsmithd.domain import LoraConfig
from tinsmithd.modeling import packing, varlen
from tinsmithd.modeling.varlen import Kernel, Shape
from tiny_models import write_tiny_model

SHAPES = (Shape(8, 2, 128), Shape(4, 4, 64), Shape(16, 1, 128))
NEAR = 0.02
"""Of the largest number; bfloat16 has 8 bits."""


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("make", varlen.KERNELS)
def test_a_kernel_gives_what_the_loop_gives(make: Callable[[], Kernel], shape: Shape) -> None:
    """Output and gradients, with and without a window, alone and behind others.

    flash-attn only where it is installed.
    """
    try:
        kernel = make()
    except ImportError as error:
        if make is varlen.torch_kernel:
            raise
        pytest.skip(f"not installed: {error}")
    device = torch.device("cuda")
    for contexts in (varlen._NO_CONTEXTS, varlen._TRIED_CONTEXTS):
        loop, compute = packing._loop, kernel.compute
        assert varlen.difference(device, torch.bfloat16, shape, loop, compute, contexts) <= NEAR


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Heads of a size that kernels take, and a window."""
    return write_tiny_model(
        *(tmp_path / "model", "qwen3"),
        hidden_size=256,
        head_dim=64,
        layer_types=["full_attention", "sliding_attention"],
        use_sliding_window=True,
        sliding_window=6,
    )


def test_an_engine_in_bfloat16_has_a_kernel_and_is_near_the_loop(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logprobs and gradients of uneven data; the ranks say which kernel it is."""
    settings, lora = Settings(models=folder.parent), LoraConfig(rank=4, seed=7)
    found = []
    for _ in range(2):
        ours = Ours(folder, settings, lora=lora, dtype="bfloat16")
        logprobs = ours.forward_backward(make_data(0, 9))
        found.append((ours, logprobs, ours.take_gradients()))
        monkeypatch.setattr(varlen, "choose", lambda *_: None)
    (by_kernel, ours, own), (by_loop, theirs, plain) = found
    assert by_kernel.engine.identity["attention_kernel"] == "torch varlen"
    assert "attention_kernel" not in by_loop.engine.identity
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=0.1)
    scale = max(np.abs(array).max() for array in plain.values())
    for name, array in plain.items():
        np.testing.assert_allclose(own[name], array, atol=NEAR * 5 * scale, err_msg=name)
