"""A model's state as files."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from checkpoints import to_files
from tinsmithd.domain import FullConfig, LoraConfig, ModelState, Tuning
from tinsmithd.state import files as state_files


def state(tuning: Tuning, **changes: Any) -> ModelState:
    rng = np.random.default_rng(0)
    shapes = {"b.weight": (3, 5), "a.weight": (7,), "ü.weight": (1, 2, 3), "none": (0, 4)}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    weights["turned"] = rng.normal(size=(4, 6)).astype(np.float32).T
    moments = {
        f"{kind}.{name}": array * 2
        for kind in ("exp_avg", "exp_avg_sq")
        for name, array in weights.items()
    }
    values = {"weights": weights, "optimizer": moments, "step_count": 3, "config": {"r": 4}}
    return ModelState(tuning, **{**values, **changes})


def saved(state: ModelState) -> dict[str, bytes]:
    """The files of tensors, as safetensors itself writes them."""
    full = isinstance(state.tuning, FullConfig)
    weights_file = state_files.FULL_WEIGHTS_FILE if full else state_files.WEIGHTS_FILE
    found = {weights_file: save(contiguous(state.weights), metadata={"format": "pt"})}
    if state.optimizer:
        found[state_files.OPTIMIZER_FILE] = save(contiguous(state.optimizer))
    return found


def contiguous(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}


FILES = {"tokenizer.json": b"{}", "tokenizer.model": b"\xff"}
STATES = {
    "adapter": state(LoraConfig(rank=4)),
    "without optimizer": state(LoraConfig(rank=4), optimizer={}),
    "full": state(FullConfig(), files={"tokenizer.json": b"{}" * 100}),
    "empty": state(FullConfig(), weights={}, optimizer={}),
}


@pytest.mark.parametrize("bytes_max", [1, 64, 1 << 20])
@pytest.mark.parametrize("case", STATES)
def test_pieces_are_the_files_byte_for_byte(case: str, bytes_max: int) -> None:
    """What safetensors itself writes; all pieces but the last of a file have the same size."""
    files: dict[str, list[bytes]] = {}
    for name, data in state_files.to_pieces(STATES[case], bytes_max):
        files.setdefault(name, []).append(data)
    written = {name: b"".join(data) for name, data in files.items()}
    assert {n: d for n, d in written.items() if n.endswith(".safetensors")} == saved(STATES[case])
    for pieces in files.values():
        assert all(len(data) == bytes_max for data in pieces[:-1])
        assert 0 < len(pieces[-1]) <= bytes_max


def test_what_was_written_is_read_back() -> None:
    """Values to the bit, and everything besides."""
    weights = {name: STATES["full"].weights[name] for name in ("a.weight", "b.weight", "turned")}
    moments = {f"{k}.{n}": a**2 for n, a in weights.items() for k in ("exp_avg", "exp_avg_sq")}
    config = {"model_type": "llama"}
    written = state(FullConfig(), weights=weights, optimizer=moments, config=config, files=FILES)
    read = state_files.from_files(to_files(written), FullConfig())
    assert (read.tuning, read.step_count, read.config, read.files) == (
        written.tuning,
        written.step_count,
        written.config,
        written.files,
    )
    for ours, theirs in ((read.weights, written.weights), (read.optimizer, written.optimizer)):
        assert ours.keys() == theirs.keys()
        for name, array in theirs.items():
            assert ours[name].tobytes() == array.tobytes()
