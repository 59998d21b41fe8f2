"""Full fine-tuning on every engine, against the plain loop that it replaces."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints import to_files
from data import collect, make_data
from engines import make_engine
from plain_loop import logprobs_of, train_plainly
from tinsmithd.domain import AdamParams, CrossEntropy, Datum, FullConfig, LoraConfig
from tinsmithd.errors import FailedPrecondition, Reason
from tinsmithd.state import files as state_files
from tinsmithd.trainer.engines.interface import Batch, TrainingEngine
from tiny_models import FAMILIES, write_tiny_model

ENGINES = {
    "reference": {"name": "reference", "zero_stage": 0},
    "deepspeed-1": {"name": "deepspeed", "zero_stage": 1},
    "deepspeed-3": {"name": "deepspeed", "zero_stage": 3},
}
ADAM = AdamParams(learning_rate=1e-2, eps=0.1, weight_decay=0.1, grad_clip_norm=30.0)
LORA = LoraConfig(rank=4, seed=7)
FULL = FullConfig()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of tiny models by family and kind of head."""
    made: dict[tuple[str, bool], Path] = {}

    def folder(family: str = "llama", *, tied: bool = False) -> Path:
        if (family, tied) not in made:
            target = tmp_path_factory.mktemp(f"{family}-{tied}")
            write_tiny_model(target, family, tie=tied)
            made[family, tied] = target
        return made[family, tied]

    return folder


def new_engine(kind: str, folder: Path) -> TrainingEngine:
    return make_engine(
        base_model=str(folder), dtype="float32", on_progress=lambda _: None, **ENGINES[kind]
    )


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, folders: Callable[..., Path]) -> TrainingEngine:
    """Each engine in turn, on a tiny Llama."""
    return new_engine(request.param, folders())


def train(engine: TrainingEngine, batches: Sequence[Sequence[Datum]]) -> list[float]:
    """One step per two batches on model "m"; returns the losses."""
    losses = []
    for index, batch in enumerate(batches):
        metrics, _ = collect(engine, "m", batch, backward=True)
        losses.append(metrics["loss:sum"])
        if index % 2:
            engine.optim_step("m", ADAM)
    return losses


def weights_of(engine: TrainingEngine) -> Mapping[str, np.ndarray]:
    return engine.export_state("m", optimizer=False).weights


def plain_loop(
    folder: Path, batches: Sequence[Sequence[Datum]]
) -> tuple[list[float], Mapping[str, np.ndarray]]:
    """Losses and final weights of an ordinary training loop."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    losses = train_plainly(model, batches, ADAM)
    return losses, {name: p.detach().numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize(
    ("family", "tied"), [(family, False) for family in FAMILIES] + [("llama", True)]
)
def test_a_full_model_equals_the_plain_loop_and_transformers_loads_it(
    folders: Callable[..., Path], kind: str, family: str, tied: bool, tmp_path: Path
) -> None:
    """Weights to 1e-6 after three clipped steps, losses to 1e-5; the head is tied or not. Exported,
    it gives the engine's logprobs in transformers, with its tokenizer."""
    folder = folders(family, tied=tied)
    engine = new_engine(kind, folder)
    engine.create_model("m", FULL)
    batches = [make_data(seed, 2) for seed in range(6)]
    losses = train(engine, batches)
    expected_losses, expected = plain_loop(folder, batches)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5, atol=1e-5)
    state = engine.export_state("m", optimizer=False)
    assert state.weights.keys() == expected.keys()
    assert ("lm_head.weight" in state.weights) is not tied
    for name, array in expected.items():
        np.testing.assert_allclose(state.weights[name], array, atol=1e-6, rtol=0, err_msg=name)
    for name, content in to_files(state).items():
        (tmp_path / name).write_bytes(content)
    data = make_data(9, 2)
    _, logprobs = collect(engine, "m", data, backward=False)
    assert_loads(tmp_path, data, logprobs)
    ours, theirs = (AutoTokenizer.from_pretrained(f) for f in (tmp_path, folder))
    assert ours("one two three").input_ids == theirs("one two three").input_ids


def assert_loads(folder: Path, data: Sequence[Datum], expected: Sequence[np.ndarray]) -> None:
    """A folder is all of a model of transformers, which gives these logprobs."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert model.config.use_cache
    for datum, logprobs in zip(data, expected, strict=True):
        with torch.no_grad():
            found = logprobs_of(model, datum).numpy()
        np.testing.assert_allclose(found, logprobs, atol=1e-5)


def test_a_saved_full_model_continues_bit_identically(engine: TrainingEngine) -> None:
    """Export, files, delete, a fresh model, import, go on: as if nothing had happened."""
    batches = [make_data(seed, 2) for seed in range(8)]
    engine.create_model("m", FULL)
    train(engine, batches[:4])
    files = to_files(engine.export_state("m", optimizer=True))
    train(engine, batches[4:])
    expected = engine.export_state("m", optimizer=True)
    engine.delete_model("m")
    state = state_files.from_files(files, None)
    engine.create_model("m", state.tuning)
    collect(engine, "m", batches[0], backward=True)  # dropped by the import
    engine.import_state("m", state, optimizer=True)
    train(engine, batches[4:])
    found = engine.export_state("m", optimizer=True)
    assert found.step_count == expected.step_count == 4
    for ours, theirs in ((found.weights, expected.weights), (found.optimizer, expected.optimizer)):
        assert ours.keys() == theirs.keys()
        for name, array in theirs.items():
            np.testing.assert_array_equal(ours[name], array, err_msg=name)


def test_what_comes_after_a_full_model_starts_from_the_base(engine: TrainingEngine) -> None:
    """An adapter, and another full model, see the weights that were loaded, not the trained."""
    data = make_data(0, 2)

    def losses() -> list[float]:
        found = []
        for tuning in (FULL, LORA):
            engine.create_model("m", tuning)
            found.append(collect(engine, "m", data, backward=False)[0]["loss:sum"])
            train(engine, [data, data])
            engine.delete_model("m")
        return found

    first = losses()
    assert losses() == first


def test_a_full_model_is_alone(engine: TrainingEngine) -> None:
    """The engine refuses another model beside it, and it beside another; nothing is lost."""
    for present, other in ((LORA, FULL), (FULL, LORA), (FULL, FULL)):
        engine.create_model("m", present)
        before = weights_of(engine)
        with pytest.raises(ValueError, match="alone"):
            engine.create_model("other", other)
        for name, array in weights_of(engine).items():
            np.testing.assert_array_equal(array, before[name])
        engine.delete_model("m")


def test_a_state_of_the_other_kind_is_refused(engine: TrainingEngine) -> None:
    """An adapter's state into a full model, and the other way: typed error, model as before."""
    states = {}
    for tuning in (LORA, FULL):
        engine.create_model("m", tuning)
        states[tuning] = engine.export_state("m", optimizer=False)
        engine.delete_model("m")
    for tuning, other in ((LORA, FULL), (FULL, LORA)):
        engine.create_model("m", tuning)
        with pytest.raises(FailedPrecondition) as refusal:
            engine.import_state("m", states[other], optimizer=False)
        assert refusal.value.reason is Reason.INCOMPATIBLE_CHECKPOINT
        for name, array in states[tuning].weights.items():
            np.testing.assert_array_equal(weights_of(engine)[name], array)
        engine.delete_model("m")


def test_a_failed_call_takes_back_what_it_added(engine: TrainingEngine) -> None:
    """Of a call that fails after its first datum, and of one rolled back, no gradient stays."""
    engine.create_model("m", FULL)
    collect(engine, "m", make_data(0, 2), backward=True)

    def give_up(index: int, outputs: Mapping[str, np.ndarray]) -> None:
        raise RuntimeError("nobody takes results")

    with pytest.raises(RuntimeError, match="nobody"):
        engine.forward(Batch("m", make_data(1, 3), CrossEntropy(), backward=True), give_up)
    engine.savepoint("m")
    collect(engine, "m", make_data(2, 2), backward=True)
    engine.rollback("m")
    engine.optim_step("m", ADAM)
    found = weights_of(engine)
    engine.delete_model("m")
    engine.create_model("m", FULL)
    collect(engine, "m", make_data(0, 2), backward=True)
    engine.optim_step("m", ADAM)
    for name, array in weights_of(engine).items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_non_finite_gradients_change_nothing(engine: TrainingEngine) -> None:
    """The step is refused and the gradients are gone; weights and step count stay."""
    engine.create_model("m", FULL)
    train(engine, [make_data(seed, 1) for seed in range(2)])
    before = engine.export_state("m", optimizer=True)
    large = make_data(1, 1)[0]
    large.loss_fn_inputs["weights"][:] = np.float32(1e25)
    collect(engine, "m", [large], backward=True)
    with pytest.raises(FailedPrecondition) as refusal:
        engine.optim_step("m", replace(ADAM, grad_clip_norm=1.0))
    assert refusal.value.reason is Reason.NON_FINITE_GRADIENT
    after = engine.export_state("m", optimizer=True)
    assert after.step_count == before.step_count == 1
    for ours, theirs in ((after.weights, before.weights), (after.optimizer, before.optimizer)):
        for name, array in theirs.items():
            np.testing.assert_array_equal(ours[name], array, err_msg=name)
    # With no gradient waiting a step counts: momentum and decay still act.
    assert engine.optim_step("m", ADAM)["step:last"] == 2


@pytest.mark.parametrize("kind", ["deepspeed-1", "deepspeed-3"])
def test_a_copy_of_a_full_model_brings_it_back(folders: Callable[..., Path], kind: str) -> None:
    """To the bit, with its moments; and what it computes from there on."""
    engine = new_engine(kind, folders())
    engine.create_model("m", FULL)
    batches = [make_data(seed, 2) for seed in range(4)]
    train(engine, batches)
    before = engine.export_state("m", optimizer=True)
    _, slot = engine.engine._models.use("m")
    copy = slot.zero.copy_state()
    losses = train(engine, batches)
    slot.zero.restore(copy)
    after = engine.export_state("m", optimizer=True)
    assert after.step_count == before.step_count
    for ours, theirs in ((after.weights, before.weights), (after.optimizer, before.optimizer)):
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert train(engine, batches) == losses
