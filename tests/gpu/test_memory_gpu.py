"""What a call does with a GPU's memory, and whether it waits for the GPU."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data import make_data
from engines import make_engine
from tinsmithd.domain import CrossEntropy, Datum, LoraConfig
from tinsmithd.modeling import device_copies
from tinsmithd.trainer.engines.deepspeed import batch_run
from tinsmithd.trainer.engines.interface import Batch
from tiny_models import write_tiny_model

MIB = 1024 * 1024
LENGTH, COUNT = 1000, 64
EXPERTS = {
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "hidden_size": 1024,
    "head_dim": 64,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "context_length": 2048,
}
"""402 M parameters of experts, 800 MB: a copy of them shows."""


def datum(length: int, seed: int) -> Datum:
    rng = np.random.default_rng(seed)
    inputs = {
        "target_tokens": rng.integers(0, 256, length),
        "weights": np.ones(length, np.float32),
    }
    return Datum(rng.integers(0, 256, length), inputs)


def engine_of(folder: Path, **settings: Any) -> Any:
    engine = make_engine("deepspeed", str(folder), dtype="bfloat16", **settings)
    engine.create_model("m", LoraConfig(rank=32, seed=7))
    return engine


def computed(engine: Any, data: list[Datum]) -> tuple[list[np.ndarray], int]:
    """Logprobs of a call, and its number of micro-batches."""
    logprobs: list[np.ndarray] = []
    batch = Batch("m", data, CrossEntropy(), backward=True)
    result = engine.forward(batch, lambda _, output: logprobs.append(output["logprobs"]))
    rounds = json.loads(result.composition)["rounds"]
    return logprobs, sum(len(of_rank) for round_ in rounds for of_rank in round_)


@contextmanager
def room(bytes_count: int) -> Iterator[None]:
    """Let this process take no more than so much beyond what it has."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + bytes_count) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_what_does_not_fit_is_split(tmp_path: Path) -> None:
    """A micro-batch that runs out of memory is computed in halves, to the same numbers, and the
    next call begins with parts that fit."""
    folder = write_tiny_model(tmp_path / "model", hidden_size=256, head_dim=64, context_length=2048)
    data = [datum(LENGTH, seed) for seed in range(COUNT)]
    settings = {"micro_batch_tokens_max": LENGTH * COUNT, "activation_bytes_max": 1 << 60}
    engine = engine_of(folder, **settings)
    computed(engine, data[:1])  # kernels and buffers
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    right, count = computed(engine, data)
    assert count == 1
    needed = torch.cuda.max_memory_allocated() - before
    with room(needed // 3):
        found, parts = computed(engine, data)
        _, again = computed(engine, data)
    assert parts > 1
    assert again > 1
    for ours, theirs in zip(found, right, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=0.1)


@pytest.mark.timeout(900)
def test_no_copy_of_the_experts_is_made(tmp_path: Path) -> None:
    """A call with adapters on all experts takes less than a tenth of their bytes, and at most half
    as much again as with adapters elsewhere."""
    folder = write_tiny_model(tmp_path / "model", "qwen3_moe", **EXPERTS)
    engine = make_engine("deepspeed", str(folder), dtype="bfloat16")
    data = [datum(256, seed) for seed in range(2)]
    most = {}
    for name, lora in (
        ("experts", LoraConfig(rank=32, seed=1, expert_rank=4)),
        ("attention", LoraConfig(rank=32, seed=1, train_mlp=False)),
    ):
        engine.create_model("m", lora)
        for _ in range(2):  # pending gradients are there the second time
            computed(engine, data)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        computed(engine, data)
        torch.cuda.synchronize()
        most[name] = torch.cuda.max_memory_allocated() - before
        trained = sum(p.numel() for p in engine.engine._models.get("m").slot.parameters)
        most[name] -= 2 * 4 * trained  # the savepoint, and gradients on their way
        engine.delete_model("m")
    experts = 2 * sum(
        parameter.numel()
        for name, parameter in engine.engine._base.model.named_parameters()
        if ".experts." in name and "lora_" not in name
    )
    assert experts > 500 * MIB
    assert most["experts"] < experts / 10, most
    assert most["experts"] <= 1.5 * max(most["attention"], 32 * MIB), most


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_nothing_waits_for_the_gpu_within_a_call(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch says so of whatever makes the host wait, micro-batch by micro-batch."""
    folder = write_tiny_model(tmp_path / "model", family, hidden_size=256, head_dim=64)
    engine = engine_of(folder, micro_batch_tokens_max=64)
    data = make_data(0, 40)
    computed(engine, data)  # loads kernels, which waits
    real = batch_run.compute_packed

    def watched(*arguments: Any, **named: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return real(*arguments, **named)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(batch_run, "compute_packed", watched)
    logprobs, count = computed(engine, data)
    assert count > 3
    assert [len(each) for each in logprobs] == [len(each.tokens) for each in data]


def test_a_large_tensor_goes_through_pinned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every element arrives in its place, also those of a last buffer that is not full."""
    monkeypatch.setattr(device_copies, "STAGE_BYTES", 4096)
    for count in (1, 1024, 2048, 5000, 12_345):
        flat = torch.arange(count, dtype=torch.float32, device="cuda")
        copy = device_copies.host_copy(flat)
        flat.zero_()
        assert copy.tolist() == list(range(count))
