"""What is timed to find out what equal bits cost, on a CPU, where it can be run as well."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tinsmithd.modeling.base import load_base
from tinsmithd.modeling.packing import use_packed_attention
from tinsmithd.trainer.compute import determinism
from tiny_models import write_tiny_model

WINDOWS = {
    "layer_types": ["full_attention", "sliding_attention"],
    "use_sliding_window": True,
    "sliding_window": 6,
}


@pytest.mark.parametrize(
    ("family", "settings"), [("llama", {}), ("qwen3", WINDOWS), ("qwen3_moe", {})]
)
def test_a_layer_of_any_family_can_be_tried(
    tmp_path: Path, family: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With kernels that keep one order, which nothing in it lacks, and with others."""
    monkeypatch.setattr(determinism, "TRIED_LENGTHS", (24, 8))
    folder = write_tiny_model(tmp_path / "model", family, **settings)
    base = load_base(str(folder), dtype="float32", on_progress=lambda _: None)
    use_packed_attention(base)
    trial = determinism.layer_trial(base.model.config, torch.device("cpu"), torch.float32)
    try:
        assert 0 < determinism.cost(trial) < 100
    finally:
        determinism.switch(False)
