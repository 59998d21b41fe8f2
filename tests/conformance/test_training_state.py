"""What a training engine must do with states, its own and others'."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from suite import ADAM, LORA, difference, new_engine, train, weights_of
from transformers import AutoModelForCausalLM

from checkpoints import to_files
from data import collect, make_data
from engines import make_engine
from plain_loop import logprobs_of
from tinsmithd.domain import LoraConfig
from tinsmithd.errors import FailedPrecondition, NotFound, Reason
from tinsmithd.modeling.base import load_base
from tinsmithd.state import files as state_files
from tinsmithd.trainer.engines.interface import TrainingEngine
from tiny_models import FAMILIES


def test_a_saved_state_continues_bit_identically(
    engine: TrainingEngine, folders: Callable[[str], Path], request: pytest.FixtureRequest
) -> None:
    """Export, files, import into a fresh engine, go on: as if nothing had happened."""
    batches = [make_data(seed, 2) for seed in range(8)]
    engine.create_model("m", LORA)
    train(engine, "m", batches[:4])
    files = to_files(engine.export_state("m", optimizer=True))
    train(engine, "m", batches[4:])

    fresh = new_engine(request.node.callspec.params["engine"], folders("llama"))
    state = state_files.from_files(files, None)
    fresh.create_model("again", state.tuning)
    collect(fresh, "again", batches[0], backward=True)  # dropped by the import
    fresh.import_state("again", state, optimizer=True)
    train(fresh, "again", batches[4:])
    ours, theirs = (e.export_state(m, optimizer=True) for e, m in ((engine, "m"), (fresh, "again")))
    assert difference(ours.weights, theirs.weights) == 0
    assert difference(ours.optimizer, theirs.optimizer) == 0
    assert ours.step_count == theirs.step_count == 4


def test_import_without_optimizer_starts_anew(engine: TrainingEngine) -> None:
    """Weights come, moments and step count do not."""
    engine.create_model("m", LORA)
    train(engine, "m", [make_data(s, 1) for s in range(4)])
    state = engine.export_state("m", optimizer=True)
    for model_id, optimizer in (("plain", False), ("full", True)):
        engine.create_model(model_id, LORA)
        engine.import_state(model_id, state, optimizer=optimizer)
        assert difference(weights_of(engine, model_id), state.weights) == 0
    assert engine.optim_step("plain", ADAM)["step:last"] == 1
    assert engine.optim_step("full", ADAM)["step:last"] == 3


def test_a_state_that_does_not_fit_is_refused_whole(engine: TrainingEngine) -> None:
    """Another rank or other targets: typed error, model as before."""
    engine.create_model("m", LORA)
    before = weights_of(engine, "m")
    for lora in (LoraConfig(rank=2), LoraConfig(rank=4, train_mlp=False)):
        engine.create_model("other", lora)
        state = engine.export_state("other", optimizer=False)
        engine.delete_model("other")
        with pytest.raises(FailedPrecondition) as refusal:
            engine.import_state("m", state, optimizer=False)
        assert refusal.value.reason is Reason.INCOMPATIBLE_CHECKPOINT
    assert difference(before, weights_of(engine, "m")) == 0


@pytest.mark.parametrize("family", list(FAMILIES))
def test_plain_peft_loads_what_was_exported(
    folders: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    """`PeftModel.from_pretrained` gives the engine's logprobs to 1e-5."""
    engine = new_engine("reference", folders(family))
    engine.create_model("m", LORA)
    train(engine, "m", [make_data(s, 2) for s in range(4)])
    data = make_data(9, 2)
    _, logprobs = collect(engine, "m", data, backward=False)
    for name, content in to_files(engine.export_state("m", optimizer=False)).items():
        (tmp_path / name).write_bytes(content)
    base = AutoModelForCausalLM.from_pretrained(folders(family), dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    for datum, expected in zip(data, logprobs, strict=True):
        with torch.no_grad():
            found = logprobs_of(model, datum).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_lora_sizes_on_the_real_model(real_model: Path) -> None:
    """Parameters per unit of rank: mlp 190,080, attn 115,200, unembed 49,728."""
    engine = new_engine("reference", real_model)
    sizes = {"train_mlp": 190_080, "train_attn": 115_200, "train_unembed": 49_728}
    for part, expected in sizes.items():
        chosen = {name: name == part for name in sizes}
        engine.create_model(part, LoraConfig(rank=2, **chosen))
        assert sum(a.size for a in weights_of(engine, part).values()) == 2 * expected
        engine.delete_model(part)


def test_unknown_base_models_fail_with_a_sentence(tmp_path: Path) -> None:
    """A missing folder and an unknown architecture name what is wrong."""
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    for name, text in ((str(tmp_path / "absent"), "absent"), (str(tmp_path), "'bert'")):
        with pytest.raises(NotFound, match=text) as refusal:
            load_base(name, dtype="float32", on_progress=lambda _: None)
        assert refusal.value.reason is Reason.BASE_MODEL_NOT_FOUND


def test_experts_of_a_partitioned_base_are_trained(folders: Callable[[str], Path]) -> None:
    """Beside an adapter that is not on them."""
    engine = make_engine(
        "deepspeed",
        str(folders("qwen3_moe")),
        dtype="float32",
        zero_stage=3,
        on_progress=lambda _: None,
    )
    engine.create_model("m", LORA)
    engine.create_model("n", LoraConfig(rank=4, train_mlp=False))
    for model_id in ("m", "n"):
        losses = train(engine, model_id, [make_data(0, 1)] * 4)
        assert losses[2] != losses[0]
