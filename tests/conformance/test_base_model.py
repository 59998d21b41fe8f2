"""A base model has exactly the weights that its configuration asks for, or is refused by name."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import programs
from tinsmithd.errors import NotFound, Reason
from tinsmithd.modeling.base import load_base
from tinsmithd.modeling.weight_files import check_weights
from tinsmithd.processes import EXIT_HOPELESS
from tinsmithd.rpc import link_secret
from tiny_models import write_tiny_model

torch.set_num_threads(1)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 269060552\n"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


def never(*_: object) -> None:
    """What a rank keeps of a model that it refuses."""
    raise AssertionError("weights are read")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def shard(folder: Path) -> dict[str, str]:
    """The weights in two files with an index; returns its map."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(weights)
    places = {}
    for number, own in enumerate((names[::2], names[1::2]), 1):
        file_name = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in own}, folder / file_name, {"format": "pt"})
        places |= dict.fromkeys(own, file_name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:count])


def without(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        rewrite(folder, lambda weights: [weights.pop(name) for name in names])  # type: ignore[arg-type, return-value]

    return change


def one_more(folder: Path) -> None:
    rewrite(folder, lambda w: w.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(48, 32)}))


def other_shape(folder: Path) -> None:
    rewrite(folder, lambda weights: weights.update({NORM: torch.zeros(31)}))


def absent_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def cut_shard(folder: Path) -> None:
    shard(folder)
    cut(folder / "model-00002-of-00002.safetensors", 5000)


def wrong_index(folder: Path) -> None:
    places = shard(folder)
    places[NORM] = next(p for p in places.values() if p != places[NORM])
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def foreign_shard(folder: Path) -> None:
    places = shard(folder)
    places[NORM] = "../other.safetensors"
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def broken_index(folder: Path) -> None:
    shard(folder)
    (folder / INDEX).write_text('{"metadata": {}, "weight_map": ["a"]}')


def half_an_index(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": shard(folder)}))


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def longer(folder: Path) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"0" * 8)


def no_tensors(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"<html>not found</html>")


DAMAGE: Mapping[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "lacks": (without(NORM, "lm_head.weight"), (NORM, "lm_head.weight")),
    "too much": (one_more, ("model.layers.2.mlp.up_proj.weight",)),
    "other shape": (other_shape, (NORM, "[31]", "[32]")),
    "cut": (lambda folder: cut(folder / WEIGHTS, 20_000), (WEIGHTS, "20,000 bytes")),
    "cut in its header": (lambda folder: cut(folder / WEIGHTS, 300), (WEIGHTS, "300 bytes")),
    "empty": (lambda folder: cut(folder / WEIGHTS, 0), (WEIGHTS, "0 bytes")),
    "longer": (longer, (WEIGHTS, "longer")),
    "no tensors": (no_tensors, (WEIGHTS,)),
    "weights in Git LFS": (
        lambda folder: (folder / WEIGHTS).write_text(POINTER) and None,
        (WEIGHTS, "git lfs pull"),
    ),
    "a tokenizer in Git LFS": (
        lambda folder: (folder / "tokenizer.json").write_text(POINTER) and None,
        ("tokenizer.json", "git lfs pull"),
    ),
    "a configuration in Git LFS": (
        lambda folder: (folder / "config.json").write_text(POINTER) and None,
        ("config.json", "git lfs pull"),
    ),
    "an absent shard": (absent_shard, (INDEX, "model-00002-of-00002.safetensors")),
    "a cut shard": (cut_shard, ("model-00002-of-00002.safetensors", "5,000 bytes")),
    "a weight in another shard": (wrong_index, (NORM, INDEX)),
    "a shard elsewhere": (foreign_shard, ("../other.safetensors",)),
    "a broken index": (broken_index, (INDEX,)),
    "half an index": (half_an_index, (INDEX,)),
    "pickled weights": (pickled, (WEIGHTS, INDEX, "only safetensors")),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_a_checkpoint_lacks_or_has_too_much_is_refused_by_name(
    case: str, tmp_path: Path
) -> None:
    """One typed error, with the names of files or weights, in one line; whatever a rank keeps."""
    damage, texts = DAMAGE[case]
    folder = write_tiny_model(tmp_path / "tiny")
    damage(folder)
    with pytest.raises(NotFound) as refusal:
        load_base(str(folder), dtype="float32", on_progress=lambda _: None)
    assert refusal.value.reason is Reason.BASE_MODEL_NOT_FOUND
    with pytest.raises(NotFound, match=f"^{re.escape(refusal.value.message)}$"):
        load_base(str(folder), dtype="float32", on_progress=lambda _: None, keep=never)
    for text in texts:
        assert text in refusal.value.message
    assert "\n" not in refusal.value.message


@pytest.mark.parametrize("lost", ["gate_proj.weight", "experts.3."])
def test_an_expert_that_lacks_is_refused(lost: str, tmp_path: Path) -> None:
    """transformers makes one parameter of all experts, where a lost one must not get lost."""
    folder = write_tiny_model(tmp_path / "tiny", "qwen3_moe")

    def lose(weights: dict[str, torch.Tensor]) -> None:
        names = [name for name in weights if "layers.1.mlp.experts.3" in name and lost in name]
        assert names
        for name in names:
            del weights[name]

    rewrite(folder, lose)
    for keep in (None, never):
        with pytest.raises(NotFound, match=r"expert|conver"):
            load_base(str(folder), dtype="float32", on_progress=lambda _: None, keep=keep)


def test_many_names_are_cut(tmp_path: Path) -> None:
    """A message shows a few and says how many more there are."""
    folder = write_tiny_model(tmp_path / "tiny", num_hidden_layers=2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 40}))
    with pytest.raises(NotFound, match=r"and 334 more") as refusal:
        load_base(str(folder), dtype="float32", on_progress=lambda _: None)
    assert len(refusal.value.message) < 1500


def test_a_whole_folder_loads_in_each_form(tmp_path: Path) -> None:
    """Tied heads lack nothing; shards, and buffers that old checkpoints have, are no fault."""
    tied = write_tiny_model(tmp_path / "tied", tie=True)
    assert "lm_head.weight" not in load_file(tied / WEIGHTS)
    load_base(str(tied), dtype="float32", on_progress=lambda _: None)
    other = write_tiny_model(tmp_path / "other")
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    rewrite(other, lambda weights: weights.update(frequencies))
    shard(other)
    load_base(str(other), dtype="float32", on_progress=lambda _: None)


def test_a_file_is_measured_before_memory_is_taken(tmp_path: Path) -> None:
    """A header that promises a terabyte is read and refused without it."""
    header = {"a": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}
    text = json.dumps(header).encode()
    (tmp_path / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(NotFound, match=r"is cut: .* not 1,099,511,627,"):
        check_weights(tmp_path)


@pytest.mark.parametrize("program", ["trainer", "sampler"])
def test_a_process_with_a_broken_base_model_gives_up_with_one_line(
    program: str, tmp_path: Path
) -> None:
    """No traceback, and a status that says that a restart cannot help."""
    folder = write_tiny_model(tmp_path / "tiny")
    without(NORM)(folder)
    arguments = [f"--base-model={folder}", *PORTS[program]]
    if program == "trainer":
        arguments.append(f"--link-secret-file={link_secret.made_in(tmp_path)}")
    ended = programs.run(f"tinsmithd.{program}", *arguments, folder=tmp_path)
    assert ended.returncode == EXIT_HOPELESS, ended.stderr
    assert "Traceback" not in ended.stderr
    lines = [line for line in ended.stderr.splitlines() if NORM in line]
    assert len(lines) == 1
    assert "lacks" in lines[0]


PORTS: Mapping[str, tuple[str, ...]] = {
    "trainer": ("--training-target=127.0.0.1:1",),
    "sampler": ("--listen-address=127.0.0.1:0",),
}
