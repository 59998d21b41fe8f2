"""What `tinsmith plan` says of a model, held to what the engine really has in memory."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from sizes_worker import CASES
from transformers import AutoConfig, AutoModelForCausalLM

import programs
from tinsmithd.config import TrainerConfig
from tinsmithd.modeling import base, supported
from tinsmithd.modeling.base import load_base
from tinsmithd.modeling.grouped_experts import use_grouped_experts
from tinsmithd.modeling.lora import Adapters
from tinsmithd.modeling.packing import use_packed_attention
from tinsmithd.modeling.weights import FUSED_WEIGHTS
from tinsmithd.sizes import (
    activations,
    adapter_weights,
    architecture,
    base_weights,
    element_count,
    plan,
    rank_bytes,
    ranks,
    read_architecture,
)
from tinsmithd.sizes.activations import (
    CHUNK_BYTES,
    CHUNK_SHARE,
    CHUNK_STEP,
    CHUNK_TOKENS_MAX,
    head_tokens,
)
from tinsmithd.trainer.compute import head, memory
from tinsmithd.trainer.engines import factory
from tinsmithd.tunings import FullConfig, LoraConfig, Tuning
from tiny_models import FAMILIES, write_tiny_model

NEAR = 0.05
"""How far a formula may be from what is measured."""
PUBLISHED = Path(__file__).parents[1] / "architectures"

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama": {"head_dim": 24},
    "llama-biased": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen2-tied": {"tie": True},
    "qwen3": {"head_dim": 24, "num_key_value_heads": 1},
    "qwen3_moe": {"norm_topk_prob": True, "num_experts": 8},
    "qwen3_moe-mixed": {"mlp_only_layers": [1], "num_hidden_layers": 3},
}


@pytest.fixture(scope="module")
def shaped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny models of uneven shapes, written once."""
    root = tmp_path_factory.mktemp("shapes")

    def folder(name: str) -> Path:
        path = root / name
        settings = {"hidden_size": 64, "intermediate_size": 112, **SHAPES[name]}
        return path if path.exists() else write_tiny_model(path, name.partition("-")[0], **settings)

    return folder


def test_constants_are_those_of_the_engine() -> None:
    """The room of the formulas imports nothing of it."""
    assert architecture.MODEL_TYPES == supported.MODEL_TYPES
    assert {n: d.itemsize for n, d in base.DTYPES.items()} == architecture.BYTES_OF_DTYPE
    assert CHUNK_BYTES == head.CHUNK_BYTES
    assert CHUNK_TOKENS_MAX == head.CHUNK_TOKENS_MAX
    assert (CHUNK_SHARE, CHUNK_STEP) == (head.CHUNK_SHARE, head.CHUNK_STEP)
    assert plan.FREE_SHARE == memory.SHARE_OF_FREE
    assert ranks.TRAINED_DTYPE == factory.TRAINED_DTYPE
    defaults = TrainerConfig(base_model="x")
    assert defaults.micro_batch_tokens_max == plan.MICRO_BATCH_TOKENS_MAX
    assert defaults.resident_models_max == plan.RESIDENT_MODELS_MAX


@pytest.mark.parametrize("gigabytes", [1, 24, 80, 141])
def test_a_gpu_makes_as_many_logits_at_once_as_is_said(
    gigabytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so does a CPU."""
    built = type("Properties", (), {"total_memory": gigabytes * 10**9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: built)
    for path in sorted(PUBLISHED.glob("*.json")):
        model = read_architecture(path)
        for device, memory_bytes in (("cuda", gigabytes * 10**9), ("cpu", None)):
            said = head_tokens(model, memory_bytes)
            assert said == head.chunk_tokens(model.vocab_size, torch.device(device))


def test_every_family_has_a_shape_here() -> None:
    assert {name.partition("-")[0] for name in SHAPES} == set(FAMILIES)


@pytest.mark.parametrize("name", [*SHAPES, *sorted(p.name for p in PUBLISHED.glob("*.json"))])
def test_the_weights_are_those_of_the_built_model(shaped: Callable[[str], Path], name: str) -> None:
    """By names and shapes, also of large models, which are built without memory."""
    path = PUBLISHED / name if name.endswith(".json") else shaped(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    built = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert dict(base_weights(read_architecture(path))) == built


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    "lora", [LoraConfig(rank=3), LoraConfig(rank=5, train_mlp=False, train_unembed=False)]
)
def test_an_adapter_is_what_peft_makes(
    shaped: Callable[[str], Path], name: str, lora: LoraConfig
) -> None:
    """By names and shapes."""
    adapters = Adapters(load_base(str(shaped(name)), dtype="float32", on_progress=_nothing))
    adapters.add("m", lora)
    made = {n: tuple(p.shape) for n, p in adapters.parameters("m").items()}
    assert dict(adapter_weights(read_architecture(shaped(name)), lora)) == made


KEPT_BY: Mapping[str, tuple[str, Sequence[Tuning]]] = {
    "float32": (
        "float32",
        [
            LoraConfig(rank=3),
            LoraConfig(rank=3, train_mlp=False),
            LoraConfig(rank=3, train_attn=False),
        ],
    ),
    "bfloat16": ("bfloat16", [LoraConfig(rank=3)]),
    "full": ("float32", [FullConfig()]),
}
"""Dtype, and tunings that can be there on one base."""


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", KEPT_BY)
def test_a_token_keeps_what_autograd_saves(
    shaped: Callable[[str], Path],
    name: str,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the engine measures it before it composes a batch, without partitions."""
    # DeepSpeed's stage 3 in another test of this process puts its own here, which saves more.
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    dtype, tunings = KEPT_BY[kind]
    loaded = load_base(str(shaped(name)), dtype=dtype, on_progress=_nothing)
    use_packed_attention(loaded)
    use_grouped_experts(loaded)
    weights = FUSED_WEIGHTS[type(tunings[0])](loaded)
    model = read_architecture(shaped(name))
    for tuning in tunings:
        weights.add("m", tuning)

        def run(count: int) -> Any:
            tokens = torch.zeros((1, count), dtype=torch.int64)
            with torch.enable_grad(), weights.active("m") as causal_lm:
                return causal_lm.model(input_ids=tokens, use_cache=False)

        measured = memory.activation_bytes_per_token(run)
        said = activations(model, tuning, dtype=dtype, partitioned=False)
        assert said.plain_bytes == pytest.approx(measured, rel=NEAR)
        weights.remove("m")


# --- what ranks hold ------------------------------------------------------------------------------


MEASURED: Mapping[tuple[str, int], Sequence[str]] = {
    ("qwen3", 1): list(CASES),
    ("qwen3", 2): list(CASES),
    # What experts change is the same wherever they are whole, and wherever they are cut.
    ("qwen3_moe", 2): ["lora-1", "lora-3", "full-1", "full-3"],
}
"""Cases by family and number of ranks."""
Measure = Callable[[str, int], tuple[Path, Path]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measure:
    """The folder of a model, and that of what so many ranks found; they run once."""

    @functools.cache
    def measure(family: str, rank_count: int) -> tuple[Path, Path]:
        sizes = {"hidden_size": 128, "intermediate_size": 352, "vocab_size": 1500, "head_dim": 32}
        if family == "qwen3_moe":
            sizes |= {"moe_intermediate_size": 64, "num_experts": 8}
        folder = write_tiny_model(tmp_path_factory.mktemp("sizes") / family, family, **sizes)
        out = tmp_path_factory.mktemp("found")
        arguments = (str(folder), str(out), *MEASURED[family, rank_count])
        done = programs.run(
            "sizes_worker", *arguments, ranks=rank_count, timeout_s=300, forked=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return folder, out

    return measure


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("family", "rank_count", "case"),
    [(*where, case) for where, cases in MEASURED.items() for case in cases],
)
def test_ranks_hold_what_is_said(
    measured: Measure, family: str, rank_count: int, case: str
) -> None:
    """Between calls, during one, gathered at once; and the files of a checkpoint."""
    folder, out = measured(family, rank_count)
    settings = {"dtype": "float32", "offload": False, **CASES[case]}
    tuning, stage = settings.pop("tuning"), settings.pop("zero_stage")
    model = read_architecture(folder)
    said = rank_bytes(model, tuning, stage=stage, ranks=rank_count, **settings)
    trained = element_count(
        adapter_weights(model, tuning) if tuning.is_adapter else base_weights(model)
    )
    for rank in range(rank_count):
        found = json.loads((out / f"{case}.{rank}.json").read_text())
        assert found["parameters"] == element_count(base_weights(model))
        assert said.kept == pytest.approx(found["kept"], rel=NEAR)
        if stage == 3:
            assert said.gathered == pytest.approx(found["gathered"], rel=NEAR)
        if case != "full-3":
            assert said.call == pytest.approx(found["call"], rel=NEAR)
        elif rank_count > 1:  # alone it hands none over; others do while weights are gathered
            most = 1.2 if model.expert_count else 1 + NEAR  # autograd lets go of experts earlier
            assert (1 - NEAR) * found["call"] <= said.call + said.gathered <= most * found["call"]
    files = sum(json.loads((out / f"{case}.0.json").read_text())["files"].values())
    assert 12 * trained == pytest.approx(files, rel=NEAR)  # the first rank alone has a state


def _nothing(_: str) -> None:
    pass
