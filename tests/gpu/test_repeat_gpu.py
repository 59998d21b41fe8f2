"""The same bits each time on a GPU, in processes of their own, where it is told to give them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import programs
from tinsmithd.modeling.base import load_base
from tinsmithd.modeling.packing import use_packed_attention
from tinsmithd.trainer.compute import determinism
from tiny_models import write_tiny_model

SIZES: Mapping[str, Any] = {"hidden_size": 256, "head_dim": 64, "context_length": 2048}
MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "dense": ("llama", {}),
    "windows": (
        "qwen3",
        {
            "layer_types": ["full_attention", "sliding_attention"],
            "use_sliding_window": True,
            "sliding_window": 100,
        },
    ),
    "experts": ("qwen3_moe", {"num_experts": 32, "num_experts_per_tok": 4}),
}
SPREAD = 2
"""Ranks, where there are so many GPUs."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [1, SPREAD])
@pytest.mark.parametrize("kind", MODELS)
def test_another_process_gives_the_same_bits(tmp_path: Path, kind: str, ranks: int) -> None:
    """Logprobs, losses, norms, weights and moments, following the compositions of the first."""
    if ranks > torch.cuda.device_count():
        pytest.skip(f"needs {ranks} GPUs")
    family, settings = MODELS[kind]
    folder = write_tiny_model(tmp_path / "model", family, **SIZES, **settings)
    for name, earlier in (("first", ""), ("again", "first")):
        done = programs.run(
            *("repeat_worker", str(folder), str(tmp_path), name, earlier),
            **{"ranks": ranks, "timeout_s": 400, "forked": False},  # type: ignore[arg-type]
        )
        assert done.returncode == 0, done.stderr[-5000:]
    first, again = (dict(np.load(tmp_path / f"{name}.npz")) for name in ("first", "again"))
    assert first.keys() == again.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


@pytest.mark.parametrize("kind", MODELS)
def test_a_layer_of_any_family_can_be_tried(tmp_path: Path, kind: str) -> None:
    """So `auto` finds out what order costs; nothing that it tries lacks such a kernel."""
    determinism.prepare()
    family, settings = MODELS[kind]
    folder = write_tiny_model(tmp_path / "model", family, **SIZES, **settings)
    base = load_base(str(folder), dtype="bfloat16", on_progress=lambda _: None)
    use_packed_attention(base)
    device = torch.device("cuda", torch.cuda.current_device())
    trial = determinism.layer_trial(base.model.config, device, torch.bfloat16)
    try:
        assert 0 < determinism.cost(trial) < 100
    finally:
        determinism.switch(False)
