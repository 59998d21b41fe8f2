"""What bringing a model back needs of a training engine; `test_replay` compares processes."""

import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

import programs
from data import make_data
from engines import make_engine
from tinsmithd import failpoints
from tinsmithd.domain import AdamParams, CrossEntropy, Datum, FullConfig, LoraConfig, Tuning
from tinsmithd.errors import FailedPrecondition
from tinsmithd.modeling.base import load_base
from tinsmithd.trainer.engines.interface import (
    Batch,
    CompositionMismatch,
    ForwardResult,
    ModelBroken,
    TrainingEngine,
)
from tiny_models import write_tiny_model

torch.set_num_threads(1)

ENGINES = {
    "reference": {"name": "reference", "zero_stage": 0},
    "deepspeed-1": {"name": "deepspeed", "zero_stage": 1},
    "deepspeed-3": {"name": "deepspeed", "zero_stage": 3},
}
TUNINGS: Mapping[str, Tuning] = {"lora": LoraConfig(rank=4, seed=7), "full": FullConfig()}
ADAM = AdamParams(learning_rate=1e-2, eps=0.1)
STAY = AdamParams(learning_rate=0.0)
"""A step that moves no weight."""


def new_engine(kind: str, folder: Path, **settings: int) -> TrainingEngine:
    return make_engine(
        base_model=str(folder),
        dtype="float32",
        on_progress=lambda _: None,
        **ENGINES[kind],
        **settings,
    )


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, tiny_model: Path) -> TrainingEngine:
    """Each engine in turn, cutting calls into several micro-batches."""
    return new_engine(request.param, tiny_model, micro_batch_tokens_max=24)


@pytest.fixture(params=TUNINGS)
def model(request: pytest.FixtureRequest, engine: TrainingEngine) -> TrainingEngine:
    """An engine with the model "m" of each kind in turn."""
    engine.create_model("m", TUNINGS[request.param])
    return engine


def forward(
    engine: TrainingEngine, data: list[Datum], *, backward: bool = True, composition: bytes = b""
) -> ForwardResult:
    return engine.forward(
        Batch("m", data, CrossEntropy(), backward=backward, composition=composition),
        lambda *_: None,
    )


def bits(engine: TrainingEngine) -> dict[str, bytes]:
    state = engine.export_state("m", optimizer=True)
    arrays = {**state.weights, **state.optimizer}
    return {"step": bytes([state.step_count]), **{k: a.tobytes() for k, a in arrays.items()}}


# --- compositions -----------------------------------------------------------------------------


def test_a_plan_repeats_a_call(model: TrainingEngine) -> None:
    """Its own composition comes back, and the step that follows is the same to the bit."""
    data = make_data(0, 7)
    found = []
    for composition in (b"", forward(model, data, backward=False).composition):
        model.savepoint("m")
        result = forward(model, data, composition=composition)
        assert result.composition
        found.append((result.composition, result.metrics["loss:sum"]))
        model.rollback("m")
    assert found[0] == found[1]


def test_a_plan_of_another_call_has_no_effect(model: TrainingEngine) -> None:
    """An error before anything happens, with any number of data and none."""
    composition = forward(model, make_data(0, 3), backward=False).composition
    for wrong in (b"?", b'{"ranks":2,"rounds":[]}', composition[:-1]):
        with pytest.raises(CompositionMismatch):
            forward(model, make_data(0, 3), composition=wrong)
    assert model.optim_step("m", ADAM)["grad_norm:last"] == 0


# --- gradients that are not finite ------------------------------------------------------------


def heavy(weight: float) -> Datum:
    datum = make_data(1, 1)[0]
    datum.loss_fn_inputs["weights"][:] = np.float32(weight)
    return datum


def test_a_call_says_that_gradients_are_no_longer_finite(model: TrainingEngine) -> None:
    """The one that brought them, those after it until a step, and no other."""
    assert not forward(model, make_data(0, 3)).non_finite
    assert not forward(model, [heavy(3e38)], backward=False).non_finite
    assert forward(model, [*make_data(0, 3), heavy(3e38)]).non_finite
    assert not forward(model, make_data(0, 3), backward=False).non_finite
    assert forward(model, make_data(0, 3)).non_finite
    with pytest.raises(FailedPrecondition):
        model.optim_step("m", ADAM)
    assert not forward(model, make_data(0, 3)).non_finite


def test_finite_gradients_with_an_infinite_norm_are_finite(model: TrainingEngine) -> None:
    """Their norm is not, which only the step says."""
    assert not forward(model, [heavy(1e25)]).non_finite
    with pytest.raises(FailedPrecondition):
        model.optim_step("m", ADAM)


def test_a_call_that_is_taken_back_leaves_no_infinity(model: TrainingEngine) -> None:
    """Rolled back, what waits is finite again."""
    forward(model, make_data(0, 2))
    model.savepoint("m")
    assert forward(model, [heavy(3e38)]).non_finite
    model.rollback("m")
    assert not forward(model, make_data(0, 2)).non_finite


# --- copies -----------------------------------------------------------------------------------


def test_a_copied_state_stays_what_it_was(model: TrainingEngine) -> None:
    """Whatever the model does afterwards, and when it is gone."""
    for seed in range(2):
        forward(model, make_data(seed, 2))
        model.optim_step("m", ADAM)
    state = model.export_state("m", optimizer=True)
    assert state.step_count == 2
    assert len(state.optimizer) == 2 * len(state.weights)
    arrays = [*state.weights.values(), *state.optimizer.values()]
    before = [array.tobytes() for array in arrays]
    for seed in range(2):
        forward(model, make_data(seed, 2))
        model.optim_step("m", ADAM)
    model.delete_model("m")
    assert [array.tobytes() for array in arrays] == before


# --- places where a rank may die --------------------------------------------------------------


@pytest.fixture
def arm(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Arms failpoints in this process."""

    def set_to(text: str) -> None:
        monkeypatch.setattr(failpoints, "_armed", failpoints._read(text))

    return set_to


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("backward", [True, False])
def test_a_failure_within_a_call_adds_nothing(
    model: TrainingEngine, arm: Callable[[str], None], backward: bool, count: int
) -> None:
    """Between two micro-batches, or after the only one; of the other kind nothing is reached."""
    mine, other = ("mid_backward", "mid_forward") if backward else ("mid_forward", "mid_backward")
    arm(f"{other}:raise")
    forward(model, make_data(1, count), backward=backward)
    model.optim_step("m", STAY)
    norms = []
    for text in (f"{mine}:raise", ""):
        arm("")
        forward(model, make_data(0, 2))
        arm(text)
        if text:
            with pytest.raises(RuntimeError, match=mine):
                forward(model, make_data(2, count), backward=backward)
        norms.append(model.optim_step("m", STAY)["grad_norm:last"])
    assert norms[0] == norms[1] > 0


def test_the_first_micro_batch_is_no_place_between_two(
    model: TrainingEngine, arm: Callable[[str], None]
) -> None:
    """Reached once less often than there are micro-batches, and once where there is one."""
    rounds = forward(model, make_data(0, 7), backward=False).composition
    micro_batch_count = rounds.count(b"[[0,[") if rounds.startswith(b"{") else 7
    assert micro_batch_count > 2
    arm(f"mid_backward:raise@{micro_batch_count}")
    forward(model, make_data(0, 7))
    with pytest.raises(RuntimeError, match="failpoint"):
        forward(model, make_data(0, 1))


def test_a_step_that_fails_half_way_breaks_the_model(
    model: TrainingEngine, arm: Callable[[str], None]
) -> None:
    """Before it nothing has happened; from its middle on the model must not be used."""
    forward(model, make_data(0, 2))
    before = bits(model)
    arm("pre_optim:raise")
    with pytest.raises(RuntimeError, match="failpoint pre_optim"):
        model.optim_step("m", ADAM)
    assert bits(model) == before
    arm("")
    assert model.optim_step("m", ADAM)["grad_norm:last"] > 0
    for name in ("mid_optim", "post_optim_pre_ack"):
        forward(model, make_data(0, 2))
        arm(f"{name}:raise")
        with pytest.raises(ModelBroken, match=name):
            model.optim_step("m", ADAM)
        arm("")


def test_a_rank_dies_where_it_is_told_to(tiny_model: Path) -> None:
    """The variable of the environment reaches a process's engine."""
    deadly = {failpoints.VARIABLE: "mid_optim:kill@2"}
    done = programs.run("deadly_worker", str(tiny_model), forked=True, **deadly)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "one\n"), done.stderr[-2000:]


# --- identity ---------------------------------------------------------------------------------


def test_an_identity_has_what_numbers_depend_on(tiny_model: Path) -> None:
    """And nothing of what they do not depend on: two engines that compute the same have one."""
    first, second = (
        new_engine(
            "deepspeed-1", tiny_model, micro_batch_tokens_max=size, resident_models_max=size
        ).identity
        for size in (3, 4)
    )
    assert first == second
    for name in ("engine", "world_size", "zero_stage", "offload", "dtype", "threads", "device"):
        assert first[name]
    for name in ("machine", "processor", "cpu_capability", "torch", "transformers", "peft"):
        assert first[name]
    assert all(isinstance(value, str) for value in first.values())
    assert (first["engine"], first["world_size"], first["threads"]) == ("deepspeed", "1", "1")
    others = [new_engine(kind, tiny_model).identity for kind in ("reference", "deepspeed-3")]
    assert others[0]["engine"] != first["engine"]
    assert others[1]["zero_stage"] != first["zero_stage"]
    assert others[0]["base_model"] == others[1]["base_model"] == first["base_model"]


def test_a_fingerprint_tells_base_models_of_one_name_apart(tmp_path: Path) -> None:
    """Other weights, another configuration, another dtype; not another place on the disk."""

    def fingerprint(place: str, dtype: str = "float32", **changes: int) -> str:
        folder = write_tiny_model(tmp_path / place / "tiny", **changes)
        base = load_base(str(folder), dtype=dtype, on_progress=lambda _: None)
        assert base.info.name == "tiny"
        return base.fingerprint

    first = fingerprint("a")
    assert fingerprint("b") == first
    others = [
        fingerprint("c", seed=1),
        fingerprint("d", context_length=1024),
        fingerprint("e", dtype="bfloat16"),
    ]
    assert len({first, *others}) == 4
