"""An adapter stands on the layers that a model has: dense ones, experts, or both."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints import to_files
from data import collect, make_data
from engines import make_engine
from sampling_engines import embedded
from tinsmithd.domain import AdamParams, LoraConfig
from tinsmithd.errors import InvalidArgument
from tinsmithd.modeling.base import load_base
from tinsmithd.modeling.lora import Adapters
from tinsmithd.trainer.engines.interface import TrainingEngine
from tiny_models import write_tiny_model

torch.set_num_threads(1)
MODELS: Mapping[str, Mapping[str, Any]] = {
    "mixed": {"mlp_only_layers": [0]},
    "by step": {"decoder_sparse_step": 2},
    "dense": {"mlp_only_layers": [0, 1]},
    "experts": {},
}
DENSE: Mapping[str, tuple[int, ...]] = {
    "mixed": (0,),
    "by step": (0,),
    "dense": (0, 1),
    "experts": (),
}
"""Layers with a dense MLP."""
ENGINES = ("reference", "deepspeed")
LORA = LoraConfig(rank=4, seed=7)
LORAS: Mapping[str, LoraConfig] = {
    "mixed": LORA,
    "dense": LORA,
    "experts": LoraConfig(rank=4, seed=7, expert_rank=1),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("mixed")

    def folder(kind: str) -> Path:
        path = root / kind
        return path if path.exists() else write_tiny_model(path, "qwen3_moe", **MODELS[kind])

    return folder


def trained(name: str, folder: Path, lora: LoraConfig = LORA) -> TrainingEngine:
    engine = make_engine(
        name, str(folder), dtype="float32", zero_stage=1, on_progress=lambda _: None
    )
    engine.create_model("m", lora)
    for seed in range(2):  # the first step moves B only, the second A
        collect(engine, "m", make_data(seed, 3), backward=True)
        engine.optim_step("m", AdamParams(learning_rate=1e-2, eps=0.1))
    return engine


def layers_of(weights: Mapping[str, np.ndarray], part: str) -> set[int]:
    return {int(name.split(".layers.")[1].split(".")[0]) for name in weights if part in name}


@pytest.mark.parametrize("kind", MODELS)
def test_train_mlp_trains_every_mlp_that_is_there(
    folders: Callable[[str], Path], kind: str
) -> None:
    """Dense MLPs beside experts learn too; reference and DeepSpeed agree."""
    by_engine = {name: trained(name, folders(kind)) for name in ENGINES}
    weights = {n: e.export_state("m", optimizer=False).weights for n, e in by_engine.items()}
    expected = weights["reference"]
    assert layers_of(expected, ".mlp.gate_proj.lora_B") == set(DENSE[kind])
    assert layers_of(expected, ".mlp.experts.") == {0, 1} - set(DENSE[kind])
    for own in weights.values():
        assert own.keys() == expected.keys()
        for name, array in own.items():
            assert np.abs(array).max() > 0, f"{name} did not learn"
            np.testing.assert_allclose(array, expected[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", LORAS)
def test_the_adapter_of_such_a_model_goes_out_and_comes_back(
    folders: Callable[[str], Path], kind: str, tmp_path: Path
) -> None:
    """Into the Sampler, into another model, and into plain PEFT: the same logprobs to 1e-5."""
    engine = trained("deepspeed", folders(kind), LORAS[kind])
    state = engine.export_state("m", optimizer=False)
    (datum,) = make_data(5, 1)
    _, (expected,) = collect(engine, "m", [datum], backward=False)
    engine.create_model("n", LORAS[kind])
    engine.import_state("n", state, optimizer=False)
    _, (again,) = collect(engine, "n", [datum], backward=False)
    np.testing.assert_array_equal(again, expected)

    tokens = np.array([*datum.tokens, datum.loss_fn_inputs["target_tokens"][-1]])
    base = AutoModelForCausalLM.from_pretrained(folders(kind), dtype=torch.float32)
    for name, content in to_files(state).items():
        (tmp_path / name).write_bytes(content)
    model = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        table = model(torch.from_numpy(tokens[None])).logits[0].log_softmax(-1).numpy()
    targets = datum.loss_fn_inputs["target_tokens"]
    np.testing.assert_allclose(table[np.arange(len(targets)), targets], expected, atol=1e-5)

    sampler = embedded(load_base(str(folders(kind)), dtype="float32", on_progress=lambda _: None))
    sampler.load_adapter("a", state)
    logprobs = sampler.score(tokens, "a")
    sampler.close()
    own = table[np.arange(len(tokens) - 1), tokens[1:]]
    np.testing.assert_allclose(logprobs[1:], own, atol=1e-5)


@pytest.mark.parametrize("engine_name", ENGINES)
@pytest.mark.parametrize(
    ("field", "parts"),
    [
        ("train_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("train_mlp", ("gate_proj", "up_proj", "down_proj")),
        ("train_unembed", ("lm_head",)),
    ],
)
def test_what_no_layer_answers_is_refused_by_its_field(
    tiny_model: Path,
    engine_name: str,
    field: str,
    parts: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on an architecture that calls its layers otherwise: nothing is made, the rest works."""
    monkeypatch.setattr("tinsmithd.modeling.lora.ATTN_MODULES", _renamed("train_attn", field))
    monkeypatch.setattr("tinsmithd.modeling.lora.MLP_MODULES", _renamed("train_mlp", field))
    unembed = "absent" if field == "train_unembed" else "lm_head"
    monkeypatch.setattr("tinsmithd.modeling.lora.UNEMBED_MODULE", unembed)
    engine = make_engine(
        engine_name, str(tiny_model), dtype="float32", zero_stage=1, on_progress=lambda _: None
    )
    with pytest.raises(InvalidArgument) as refusal:
        engine.create_model("m", LORA)
    assert refusal.value.field == f"lora_config.{field}"
    settings: dict[str, Any] = {field: False}
    engine.create_model("m", LoraConfig(rank=4, seed=7, **settings))
    names = engine.export_state("m", optimizer=False).weights
    assert names
    assert not any(f".{part}." in name for name in names for part in parts)


def _renamed(own: str, field: str) -> tuple[str, ...]:
    names = {
        "train_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "train_mlp": ("gate_proj", "up_proj", "down_proj"),
    }[own]
    return tuple(f"other_{name}" for name in names) if own == field else names


def test_targets_are_those_of_the_model(folders: Callable[[str], Path]) -> None:
    """An adapter on a model of experts only has the files that it always had."""
    base = load_base(str(folders("experts")), dtype="float32", on_progress=lambda _: None)
    adapters = Adapters(base)
    adapters.add("a", LORA)
    config = adapters.config("a")
    assert config["target_modules"] == ["k_proj", "lm_head", "o_proj", "q_proj", "v_proj"]
    assert config["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert config["rank_pattern"] == {}


@pytest.mark.parametrize("engine_name", ENGINES)
def test_a_rank_for_experts_needs_experts(folders: Callable[[str], Path], engine_name: str) -> None:
    """It is refused by its field where none would be adapted."""
    engine = make_engine(engine_name, str(folders("dense")), dtype="float32", zero_stage=1)
    with pytest.raises(InvalidArgument) as refusal:
        engine.create_model("m", LoraConfig(rank=4, expert_rank=2))
    assert refusal.value.field == "lora_config.expert_rank"
    assert engine.info.active_expert_count == 0
    engine = make_engine(engine_name, str(folders("experts")), dtype="float32", zero_stage=1)
    assert engine.info.active_expert_count == 2
    with pytest.raises(InvalidArgument) as refusal:
        engine.create_model("m", LoraConfig(rank=4, expert_rank=2, train_mlp=False))
    assert refusal.value.field == "lora_config.expert_rank"
