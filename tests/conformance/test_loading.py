"""What a rank keeps of a base model it reads from the files, and nothing else."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_base_model import WEIGHTS, cut, rewrite, shard

import programs
from tinsmithd.errors import NotFound, Reason
from tinsmithd.modeling import stored_weights
from tinsmithd.modeling.base import BaseModel, load_base
from tinsmithd.modeling.stored_weights import StoredWeights
from tiny_models import write_tiny_model

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def in_thirds(model: Any, stored: StoredWeights) -> None:
    """Keep all, as three ranks would that keep a third each."""
    kept = {}
    for name, parameter in model.named_parameters():
        values = torch.empty(parameter.numel(), dtype=parameter.dtype)
        start = 0
        for part in values.tensor_split(3):
            stored.read(name, start, part)
            start += len(part)
        kept[id(parameter)] = torch.nn.Parameter(values.view(parameter.shape), requires_grad=False)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, kept[id(parameter)])


def loaded(folder: Path, dtype: str, **more: Any) -> BaseModel:
    return load_base(str(folder), dtype=dtype, on_progress=lambda _: None, **more)


def twice(factor: float) -> Callable[[Path], object]:
    """A head in the file, too, where the configuration says that it is the embedding."""
    return lambda folder: rewrite(folder, lambda w: w.update({HEAD: factor * w[EMBEDDING]}))


def renamed(rename: Callable[[str], str]) -> Callable[[Path], object]:
    def change(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            weights[rename(name)] = weights.pop(name)

    return lambda folder: rewrite(folder, change)


def halved(folder: Path) -> None:
    rewrite(folder, lambda weights: weights.update({n: w.half() for n, w in weights.items()}))


def merged(folder: Path) -> None:
    """The experts as the model's modules have them, not as files usually do."""
    modules = {n: w.clone() for n, w in loaded(folder, "float32").model.state_dict().items()}
    save_file(modules, folder / WEIGHTS, metadata={"format": "pt"})


KINDS: Mapping[str, tuple[Mapping[str, Any], Callable[[Path], object]]] = {
    "one file": ({}, lambda _: None),
    "shards": ({"family": "qwen2"}, shard),
    "float16": ({"family": "qwen3"}, halved),
    "tied": ({"tie": True}, lambda _: None),
    "tied, and there twice": ({"tie": True}, twice(1)),
    "tied, but other values": ({"tie": True}, twice(2)),
    "tied, by its other name": ({"tie": True}, renamed(lambda n: n.replace(EMBEDDING, HEAD))),
    "without a prefix": ({"tie": True}, renamed(lambda name: name.removeprefix("model."))),
    "experts": ({"family": "qwen3_moe"}, lambda _: None),
    "experts in shards": ({"family": "qwen3_moe"}, shard),
    "experts merged": ({"family": "qwen3_moe"}, merged),
    "buffers of their own": ({"rope_scaling": LLAMA3}, lambda _: None),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_slices_are_what_transformers_loads(kind: str, dtype: str, tmp_path: Path) -> None:
    """Every weight and buffer, and the fingerprint, in each form that files can have."""
    settings, change = KINDS[kind]
    folder = write_tiny_model(tmp_path / "tiny", **settings)
    change(folder)
    whole, sliced = loaded(folder, dtype), loaded(folder, dtype, keep=in_thirds)
    assert (sliced.info, sliced.fingerprint) == (whole.info, whole.fingerprint)
    for every in ("named_parameters", "named_buffers"):
        expected, found = (dict(getattr(b.model, every)()) for b in (whole, sliced))
        assert list(found) == list(expected)
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), name


def test_what_cannot_be_read_in_slices_is_refused_by_name(tmp_path: Path) -> None:
    """As where a tensor has a dtype that no slice is converted from."""
    folder = write_tiny_model(tmp_path / "tiny")
    rewrite(folder, lambda w: w.update({HEAD: w[HEAD].to(torch.float8_e4m3fn)}))
    with pytest.raises(NotFound, match=f"{HEAD} is stored in a way") as refusal:
        loaded(folder, "float32", keep=in_thirds)
    assert refusal.value.reason is Reason.BASE_MODEL_NOT_FOUND


def test_a_file_that_is_cut_while_it_is_read_is_refused(tmp_path: Path) -> None:
    """Nothing is served of what was not read."""
    folder = write_tiny_model(tmp_path / "tiny")

    def keep(model: Any, stored: StoredWeights) -> None:
        cut(folder / WEIGHTS, 20_000)
        in_thirds(model, stored)

    with pytest.raises(NotFound, match=f"{WEIGHTS}: it was cut"):
        loaded(folder, "float32", keep=keep)


def test_progress_has_bytes_and_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what this process keeps: here all."""
    monkeypatch.setattr(stored_weights, "PROGRESS_S", 0.0)
    folder = write_tiny_model(tmp_path / "tiny", hidden_size=512, intermediate_size=4096)

    def keep(model: Any, stored: StoredWeights) -> None:
        for name, parameter in model.named_parameters():
            stored.keep(name, 0, torch.empty(parameter.numel()))

    said: list[str] = []
    load_base(str(folder), dtype="float32", on_progress=said.append, keep=keep)
    lines = [line for line in said if " GB, about " in line]
    assert lines[-1].startswith("tiny: loaded 0.1 of 0.1 GB, about 0 s left")


def test_a_rank_takes_memory_for_its_share_alone(tmp_path: Path) -> None:
    """Each of two ranks reads half of a model of 235 MB, and never has the whole."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
    folder = write_tiny_model(tmp_path / "model", **sizes, initializer_range=0.02)
    size = (folder / WEIGHTS).stat().st_size
    fingerprint = loaded(folder, "float32").fingerprint
    arguments = (str(folder), "float32", "lora")
    done = programs.run("bench.loading_worker", *arguments, ranks=2, forked=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for line in done.stdout.splitlines():
        found = json.loads(line)
        assert found["fingerprint"] == fingerprint
        grown = found["loaded_peak_bytes"] - found["before_bytes"]
        assert grown < 1.25 * size / 2 + 40e6 < size


def test_ranks_with_other_files_are_refused(tmp_path: Path) -> None:
    """Else each would compute with shares of two models."""
    for rank in range(2):
        write_tiny_model(tmp_path / f"model-{rank}", seed=rank)
    arguments = (str(tmp_path / "model-{rank}"), "float32", "lora")
    done = programs.run("bench.loading_worker", *arguments, ranks=2, forked=True)
    assert done.returncode
    assert "its files are not the same on all hosts" in done.stderr
