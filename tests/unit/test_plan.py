"""`tinsmith plan`: what it reads, what it recommends, what it refuses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import size_tables
from tinsmith import cli
from tinsmithd.sizes import (
    Architecture,
    Machine,
    Plan,
    Unreadable,
    Wanted,
    activations,
    make_plan,
    plan,
    read_architecture,
)
from tinsmithd.tunings import FullConfig, LoraConfig

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ROOT / "tests" / "architectures"
ATTENTION = LoraConfig(train_mlp=False)


def model(name: str) -> Architecture:
    return read_architecture(ARCHITECTURES / f"{name}.json")


def planned(name: str, gpus: int | None = None, **wanted: Any) -> Plan:
    return make_plan(model(name), Machine(gpus), Wanted(**wanted))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    """Exit status (or the sentence that stands for 1), standard output, standard error."""
    status: object = 0
    try:
        cli.main(["plan", *arguments])
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("Qwen3-8B", 8_190_735_360, 8.19e9),
        ("Qwen3-30B-A3B", 30_532_122_624, 3.3e9),
        ("Qwen3-235B-A22B", 235_093_634_560, 22e9),
        ("Llama-3.1-70B", 70_553_706_496, 70.55e9),
    ],
)
def test_parameters_are_those_that_were_published(name: str, total: int, active: float) -> None:
    """To the last one, and the active ones as the models' names say."""
    found = planned(name)
    assert found.parameter_count == total
    assert found.active_parameter_count == pytest.approx(active, rel=0.02)


def test_the_quickest_layout_that_fits_is_recommended() -> None:
    """One GPU for 8B; more of the memory's work in later stages, for a full model."""
    lora = planned("Qwen3-8B").layout
    assert lora is not None
    assert (lora.ranks, lora.stage, lora.offload) == (1, 0, False)
    full = planned("Qwen3-8B", 8, tuning=FullConfig()).layout
    assert full is not None
    assert (full.stage, full.offload) == (3, False)
    wide = make_plan(model("Qwen3-8B"), Machine(8, 640 * plan.GB), Wanted(FullConfig())).layout
    assert wide is not None
    assert wide.stage == 1


def test_room_is_what_nobody_else_takes() -> None:
    """Kept, gathered, a call's own, logits and room are what can be used."""
    found = planned("Qwen3-30B-A3B", 8, tuning=ATTENTION)
    layout = found.layout
    assert layout is not None
    rank, kept = layout.rank, found.activations
    others = rank.gathered + rank.call + kept.head_bytes
    assert layout.kept_bytes + others + layout.room_bytes == found.machine.usable_bytes
    assert layout.plain_tokens * kept.plain_bytes <= layout.room_bytes
    assert layout.datum_tokens_max * kept.recomputed_bytes <= layout.room_bytes


def test_more_models_take_more_of_a_device_and_then_of_the_host() -> None:
    """Beyond `resident_models_max` they wait in host memory."""
    found = [planned("Qwen3-8B", 8, models=number).layout for number in (1, 16, 40)]
    one, sixteen, forty = (layout for layout in found if layout is not None)
    assert one.kept_bytes < sixteen.kept_bytes == forty.kept_bytes
    assert one.host_bytes == sixteen.host_bytes < forty.host_bytes


@pytest.mark.parametrize(
    ("name", "machine", "wanted", "said"),
    [
        ("Llama-3.1-70B", Machine(8), Wanted(FullConfig()), "stage 3 with offload needs 124.9 GB"),
        ("Qwen3-8B", Machine(8), Wanted(FullConfig(), stage=1), "before any activations"),
        ("Qwen3-8B", Machine(1, 24 * plan.GB), Wanted(tokens=40_960), "room for a datum of"),
        ("Qwen3-8B", Machine(8, host_bytes=40 * plan.GB), Wanted(), "of host memory with 8 rank"),
        ("Qwen3-8B", Machine(1, plan.GB), Wanted(), "0.0 GB of each GPU can be used"),
    ],
)
def test_what_cannot_fit_is_refused_with_its_reason(
    name: str, machine: Machine, wanted: Wanted, said: str
) -> None:
    """One sentence with what is needed and what there is."""
    found = make_plan(model(name), machine, wanted)
    assert found.layout is None
    assert said in found.refusal
    assert f"{machine.gpus} GPU(s)" in found.refusal


def test_the_command_says_what_fits_and_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    """A table of all stages, for adapters and full fine-tuning, and the settings."""
    path = str(ARCHITECTURES / "Qwen3-8B.json")
    status, out, err = run(capsys, path, "--gpus", "8", "--rank", "16")
    assert (status, err) == (0, "")
    assert "8.19 billion parameters" in out
    assert "TINSMITH_TRAINER_RANKS=8" in out
    assert "TINSMITH_TRAINER_ZERO_STAGE=1" in out


def test_the_command_refuses_with_status_1_and_a_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The figures are printed all the same."""
    path = str(ARCHITECTURES / "Qwen3-235B-A22B.json")
    status, out, _ = run(capsys, path, "--gpus", "8", "--full")
    assert str(status).startswith("tinsmith: Qwen3-235B-A22B: all weights with data of 2,048")
    assert "235.09 billion parameters, 22.19 billion of them active" in out


def test_json_has_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    """In bytes; a refusal is in it, too."""
    path = str(ARCHITECTURES / "Qwen3-30B-A3B.json")
    _, out, _ = run(capsys, path, "--gpus", "8", "--no-train-mlp", "--json")
    fits = json.loads(out)
    assert fits["fits"]
    assert fits["layout"]["stage"] == 1
    assert set(fits["stages"]) == {"lora", "full"}
    assert all(set(stages) == {"0", "1", "2", "3"} for stages in fits["stages"].values())
    status, out, _ = run(capsys, path, "--gpus", "1", "--full", "--json")
    assert status
    assert json.loads(out)["refusal"] in str(status)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "0"], "not between 1"),
        (["--gpu-memory", "nan"], "not between 0"),
        (["--tokens", "50000"], "was made for 40,960 tokens"),
        (["--full", "--models", "2"], "has the ranks for itself"),
        (["--offload", "--zero-stage", "0"], "stage 1 or more"),
        (["--no-train-attn", "--no-train-mlp", "--no-train-unembed"], "must be true"),
    ],
)
def test_a_wrong_option_is_named(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, str(ARCHITECTURES / "Qwen3-8B.json"), *arguments)
    assert status == 2
    assert said in err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gpt2"}, "architecture 'gpt2' is not one of llama"),
        ({"hidden_size": -1}, "hidden_size is -1, not a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 1 << 30}, "at most 10000"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', not true or false"),
        ({"num_key_value_heads": 3}, "no multiple of 3"),
        ({"hidden_size": 8, "head_dim": None, "model_type": "llama"}, "hidden_size 8 is less"),
        ({"rope_scaling": "linear"}, "rope_scaling is not an object"),
        ({"layer_types": "full"}, "layer_types is not a list of texts"),
        ({"layer_types": ["full_attention"]}, "1 layer_types for 36 layers"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": 5}, "mlp_only_layers is not a list"),
    ],
)
def test_a_configuration_that_is_not_known_is_refused(
    change: dict[str, object], said: str, tmp_path: Path
) -> None:
    """By the entry that is wrong."""
    document = json.loads((ARCHITECTURES / "Qwen3-8B.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**document, **change}))
    with pytest.raises(Unreadable, match=said):
        read_architecture(tmp_path)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_what_is_no_configuration_is_refused(content: str | None, tmp_path: Path) -> None:
    """With how to name one."""
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(Unreadable, match=r"give a folder|is not"):
        read_architecture(tmp_path)


def test_the_tables_in_the_documents_are_true() -> None:
    assert size_tables.DOCUMENT.read_text() == size_tables.drawn(), "run `make sizes`"


def test_head_alone_keeps_nothing_of_the_layers() -> None:
    """There is nothing to go back to below it."""
    lora = LoraConfig(train_attn=False, train_mlp=False)
    kept = activations(model("Qwen3-8B"), lora, dtype="bfloat16", partitioned=False)
    assert kept.plain_bytes == 0


def test_a_plan_needs_neither_torch_nor_a_server() -> None:
    """It runs where the client alone is installed, and imports no other package."""
    code = (
        "import sys; from tinsmithd.sizes.command import main;"
        f"main([{str(ARCHITECTURES / 'Qwen3-8B.json')!r}]);"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy', 'grpc')))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": str(ROOT / "services"), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
