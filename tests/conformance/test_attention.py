"""What a layer asks of its attention is done inside each datum, or the model is refused."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from data import collect
from engines import make_engine
from sampling_engines import embedded
from tinsmithd.domain import AdamParams, Datum, LoraConfig, SampleRequest, SamplingParams
from tinsmithd.errors import NotFound, Reason
from tinsmithd.modeling.base import BaseModel, load_base
from tinsmithd.modeling.packing import (
    UnsupportedAttention,
    packed_attention,
    use_packed_attention,
)
from tinsmithd.trainer.engines.interface import TrainingEngine
from tiny_models import write_tiny_model

torch.set_num_threads(1)
WINDOW = 4
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "qwen2": {"max_window_layers": 1},  # one layer sees all, one a window
    "qwen3": {"layer_types": ["sliding_attention", "full_attention"]},
    "qwen3_moe": {},
}
LENGTHS = (13, 3, 9, 9, WINDOW, 21)
"""Neighbours in one forward: longer than the window, shorter, equal to it."""
LORA = LoraConfig(rank=4, seed=7)


def load(folder: Path) -> BaseModel:
    return load_base(str(folder), dtype="float32", on_progress=lambda _: None)


def data() -> list[Datum]:
    rng = np.random.default_rng(0)
    return [
        Datum(
            rng.integers(0, 256, length),
            {
                "target_tokens": rng.integers(0, 256, length),
                "weights": rng.normal(size=length).astype(np.float32),
            },
        )
        for length in LENGTHS
    ]


@pytest.fixture(scope="module", params=list(FAMILIES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each family that has windows."""
    settings = {"use_sliding_window": True, "sliding_window": WINDOW, **FAMILIES[request.param]}
    place = tmp_path_factory.mktemp("windows") / request.param
    return write_tiny_model(place, request.param, **settings)


def trained(engine: TrainingEngine) -> tuple[list[np.ndarray], Mapping[str, np.ndarray]]:
    """Logprobs after a step, and the weights."""
    engine.create_model("m", LORA)
    collect(engine, "m", data(), backward=True)
    engine.optim_step("m", AdamParams(learning_rate=1e-2, eps=0.1))
    _, logprobs = collect(engine, "m", data(), backward=False)
    return logprobs, engine.export_state("m", optimizer=False).weights


def new_engine(name: str, folder: Path, **settings: int) -> TrainingEngine:
    settings = {"zero_stage": 0, **settings}
    return make_engine(name, str(folder), dtype="float32", on_progress=lambda _: None, **settings)  # type: ignore[arg-type]


ENGINES: Mapping[str, Mapping[str, int]] = {
    **{f"stage {stage}": {"zero_stage": stage} for stage in (0, 1, 2, 3)},
    "recomputed": {"activation_bytes_max": 1},
}


def test_what_a_window_hides_is_hidden_in_every_engine(folder: Path) -> None:
    """Logprobs and weights after a step: reference and DeepSpeed in every stage, to 1e-5."""
    logprobs, weights = trained(new_engine("reference", folder))
    for name, settings in ENGINES.items():
        found, own = trained(new_engine("deepspeed", folder, **settings))
        for ours, theirs in zip(found, logprobs, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=name)
        for key, array in weights.items():
            np.testing.assert_allclose(own[key], array, atol=1e-5, err_msg=f"{name} {key}")


def test_trainer_and_sampler_and_transformers_see_the_same_windows(folder: Path) -> None:
    """Of the base: trainer, scored prompt, sampled tokens and plain transformers, to 1e-5."""
    sampler = embedded(load(folder))
    params = SamplingParams(max_tokens=3 * WINDOW, seed=1, stop_at_eos=False)
    prompt = np.arange(10, 10 + 2 * WINDOW)
    drained = sampler.drain(SampleRequest(prompt, 1, params, True))
    sampler.close()
    (made,) = drained.sequences
    assert drained.scores is not None
    assert drained.scores.logprobs is not None
    sampled = [*drained.scores.logprobs[1:], *made.logprobs]
    tokens = np.array([*prompt, *made.tokens])
    inputs = {
        "target_tokens": tokens[1:],
        "weights": np.ones(len(tokens) - 1, np.float32),
    }
    trainer = new_engine("deepspeed", folder)
    trainer.create_model("m", LORA)
    _, (_, found) = collect(trainer, "m", [data()[0], Datum(tokens[:-1], inputs)], backward=False)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        table = plain(torch.from_numpy(tokens[None, :-1])).logits[0].log_softmax(-1)
    expected = table.gather(1, torch.from_numpy(tokens[1:, None]))[:, 0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(sampled, expected, atol=1e-5)


@pytest.mark.parametrize("window", [4, 300])
def test_long_windows_are_computed_in_blocks(window: int) -> None:
    """Several blocks, equal neighbours, grouped heads; output and gradients against a mask."""
    lengths = [700, 700, 5]
    total = sum(lengths)
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    query = torch.randn(1, 4, total, 8, dtype=torch.float64, requires_grad=True)
    key, value = (
        torch.randn(1, 2, total, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    found, _ = packed_attention(
        module, query, key, value, None, sliding_window=window, segment_lengths=lengths
    )
    place = torch.arange(total)
    segment = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    distance = place[:, None] - place[None]
    mask = (segment[:, None] == segment[None]) & (distance >= 0) & (distance < window)
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) / 8**0.5
    probabilities = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    expected = (probabilities @ value.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    seed = torch.randn_like(expected)
    ours, theirs = (
        torch.autograd.grad(output, (query, key, value), seed) for output in (found, expected)
    )
    torch.testing.assert_close(ours, theirs)


# --- refused --------------------------------------------------------------------------------------

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 16,
}
REFUSED: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    "chunks": (
        "qwen3",
        {"layer_types": ["full_attention", "chunked_attention"]},
        "layer_types: chunked_attention",
    ),
    "a window without a size": (
        "qwen3",
        {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": False},
        "layer_types: sliding_attention",
    ),
    "frequencies that depend on the length": (
        "llama",
        {"rope_parameters": LONGROPE},
        "rope_type: 'longrope'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_refused_by_its_entry(case: str, tmp_path: Path) -> None:
    """At load, by the one loader of trainer and Sampler."""
    family, settings, text = REFUSED[case]
    folder = write_tiny_model(tmp_path / "tiny", family)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(settings)))
    with pytest.raises(NotFound) as refusal:
        load(folder)
    assert refusal.value.reason is Reason.BASE_MODEL_NOT_FOUND
    assert text in refusal.value.message


ASKED: Mapping[str, Any] = {
    "softcap": 50.0,
    "s_aux": torch.zeros(4),
    "position_bias": torch.zeros(1, 4, 2, 2),
    "is_causal": False,
    "dropout": 0.1,
    "anything_new": 1,
}


@pytest.mark.parametrize("keyword", ASKED)
def test_a_keyword_that_attention_does_not_honour_refuses_the_model(
    keyword: str, tiny_model: Path
) -> None:
    """Whatever a layer gives its attention beyond what is known shows before the first call."""
    base = load(tiny_model)
    layer = base.model.model.layers[1].self_attn
    if keyword == "dropout":
        layer.training, layer.attention_dropout = True, ASKED[keyword]
    else:
        layer.forward = functools.partial(layer.forward, **{keyword: ASKED[keyword]})
    with pytest.raises(NotFound, match=keyword) as refusal:
        use_packed_attention(base)
    assert refusal.value.reason is Reason.BASE_MODEL_NOT_FOUND


def test_a_keyword_that_says_nothing_is_taken(tiny_model: Path) -> None:
    """None and False ask for nothing; a mask is never taken."""
    tensors = [torch.zeros(1, 2, 3, 8)] * 3
    packed_attention(torch.nn.Module(), *tensors, None, softcap=None, output_attentions=False)
    with pytest.raises(UnsupportedAttention, match="attention_mask"):
        packed_attention(torch.nn.Module(), *tensors, torch.ones(3, 3))


def test_a_datum_is_computed_as_if_its_neighbours_were_not_there(tmp_path: Path) -> None:
    """With every rope that is served, of whatever type: beside a longer one to 5e-6."""
    ropes: Mapping[str, Mapping[str, Any]] = {
        "dynamic": {"factor": 2.0},
        "linear": {"factor": 2.0},
        "yarn": {"factor": 2.0, "original_max_position_embeddings": 16},
        "llama3": {
            "factor": 2.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    }
    short, long = data()[1], data()[5]
    for kind, settings in ropes.items():
        rope = {"rope_type": kind, "rope_theta": 10000.0, **settings}
        folder = write_tiny_model(tmp_path / kind, context_length=32, rope_parameters=rope)
        engine = new_engine("deepspeed", folder)
        engine.create_model("m", LORA)
        _, (alone,) = collect(engine, "m", [short], backward=False)
        _, (_, beside) = collect(engine, "m", [long, short], backward=False)
        np.testing.assert_allclose(beside, alone, atol=5e-6, err_msg=kind)
