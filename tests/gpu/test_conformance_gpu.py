"""What a training engine must do, on a GPU: the DeepSpeed engine beside a plain PEFT loop there.

In float32 both agree to 1e-4. In bfloat16 the engine must be no further from the float32 loop than
the plain bfloat16 loop is, within a factor. Kernels add in no fixed order on a GPU, so nothing here
asks for equal bits but what no kernel touches.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.harness import compare
from bench.sides import MODEL_ID, BareLoop, Ours, Settings
from checkpoints import to_files
from data import make_data
from plain_loop import adamw
from tinsmithd.domain import AdamParams, CrossEntropy, Datum, LoraConfig
from tinsmithd.errors import FailedPrecondition, Reason
from tinsmithd.state import files as state_files
from tinsmithd.trainer.engines.interface import Batch
from tiny_models import FAMILIES, write_tiny_model

DEVICE = "cuda"
DTYPES = ("float32", "bfloat16")
LORA = LoraConfig(rank=4, seed=7)
ADAM = AdamParams(learning_rate=1e-2, eps=0.1, weight_decay=0.1, grad_clip_norm=50.0)
BFLOAT16_FACTOR = 2.0
CLOSE = {"float32": 1e-4, "bfloat16": 0.1}
"""Largest distance of logprobs that were computed in two ways, by dtype."""

Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Tiny models by family, written once."""
    root = tmp_path_factory.mktemp("families")

    def folder(family: str) -> Path:
        path = root / family
        return path if path.exists() else write_tiny_model(path, family)

    return folder


def new_engine(folder: Path, dtype: str) -> Ours:
    return Ours(folder, Settings(models=folder.parent), lora=LORA, dtype=dtype)


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    """Each dtype of the base model."""
    return str(request.param)


@pytest.fixture
def ours(dtype: str, folders: Folders) -> Ours:
    """The engine on a tiny Llama, with one model in it."""
    return new_engine(folders("llama"), dtype)


def numbers(side: Ours | BareLoop, data: list[Datum]) -> tuple[list[np.ndarray], dict]:
    """Logprobs and gradients of one call; nothing waits afterwards."""
    run = side.forward_backward if isinstance(side, Ours) else side.one_by_one
    return run(data), side.take_gradients()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_it_computes_what_a_plain_loop_computes(folders: Folders, family: str, dtype: str) -> None:
    """Logprobs and gradients of a ragged batch."""
    folder = folders(family)
    ours = new_engine(folder, dtype)
    data = [*make_data(0, 5), *make_data(1, 3)]
    exact = numbers(BareLoop(folder, ours.start, device=DEVICE), data)
    found = compare(numbers(ours, data), exact)
    if dtype == "float32":
        assert found.holds, found
        return
    plain = numbers(BareLoop(folder, ours.start, dtype=dtype, device=DEVICE), data)
    limit = compare(plain, exact)
    assert found.logprobs_abs <= BFLOAT16_FACTOR * limit.logprobs_abs, (found, limit)
    assert found.gradients_rel <= BFLOAT16_FACTOR * limit.gradients_rel, (found, limit)


def test_steps_are_those_of_adamw(folders: Folders) -> None:
    """Weights after steps with decay and clipping, at a large eps."""
    folder = folders("llama")
    ours = new_engine(folder, "float32")
    bare = BareLoop(folder, ours.start, device=DEVICE)
    parameters = list(bare.parameters.values())
    optimizer = adamw(parameters, ADAM)
    for seed in range(4):
        data = make_data(seed, 3)
        ours.forward_backward(data)
        bare.one_by_one(data)
        norm = torch.nn.utils.clip_grad_norm_(parameters, ADAM.grad_clip_norm)
        optimizer.step()
        bare.clear()
        metrics = ours.engine.optim_step(MODEL_ID, ADAM)
        assert metrics["grad_norm:last"] == pytest.approx(float(norm), rel=1e-4)
    weights = ours.engine.export_state(MODEL_ID, optimizer=False).weights
    for name, parameter in bare.parameters.items():
        np.testing.assert_allclose(weights[name], parameter.detach().cpu().numpy(), atol=1e-5)


def test_data_computed_together_do_not_see_each_other(ours: Ours, dtype: str) -> None:
    """Each datum's logprobs are those that it has alone."""
    data = make_data(0, 6)
    together = ours.forward_backward(data)
    for datum, found in zip(data, together, strict=True):
        (alone,) = ours.forward_backward([datum])
        np.testing.assert_allclose(found, alone, atol=CLOSE[dtype])


def test_calls_accumulate(ours: Ours, dtype: str) -> None:
    """Two calls are one call with both data."""
    data = make_data(0, 5)
    whole = numbers(ours, data)
    parts = [*ours.forward_backward(data[:2]), *ours.forward_backward(data[2:])]
    found = compare((parts, ours.take_gradients()), whole)
    assert found.logprobs_abs <= CLOSE[dtype]
    assert found.gradients_rel <= CLOSE[dtype]


def test_forward_and_learning_rate_zero_change_nothing(ours: Ours) -> None:
    """No gradient waits after a forward; a step of rate 0 leaves every bit of the weights."""
    ours.engine.forward(
        Batch(MODEL_ID, make_data(0, 2), CrossEntropy(), backward=False), lambda _, __: None
    )
    still = AdamParams(learning_rate=0.0)
    assert ours.engine.optim_step(MODEL_ID, still)["grad_norm:last"] == 0
    ours.forward_backward(make_data(0, 2))
    assert ours.engine.optim_step(MODEL_ID, still)["grad_norm:last"] > 0
    weights = ours.engine.export_state(MODEL_ID, optimizer=False).weights
    for name, array in ours.start.weights.items():
        np.testing.assert_array_equal(weights[name], array)


def test_a_failed_call_adds_nothing(ours: Ours) -> None:
    """The waiting gradients are those from before the call."""
    data = make_data(0, 4)

    def fail(index: int, _: object) -> None:
        if index == 2:
            raise RuntimeError("lost")

    expected = numbers(ours, data[:1])[1]
    ours.forward_backward(data[:1])
    with pytest.raises(RuntimeError, match="lost"):
        ours.engine.forward(Batch(MODEL_ID, data, CrossEntropy(), backward=True), fail)
    found = compare(([], ours.take_gradients()), ([], expected))
    assert found.gradients_rel <= CLOSE["float32"]


def test_a_non_finite_gradient_is_refused(ours: Ours) -> None:
    """The weights stay, and the next step works."""
    bad = make_data(1, 1)[0]
    bad.loss_fn_inputs["weights"][0] = np.float32(3e38)
    ours.forward_backward([bad, bad])
    with pytest.raises(FailedPrecondition) as refusal:
        ours.engine.optim_step(MODEL_ID, ADAM)
    assert refusal.value.reason is Reason.NON_FINITE_GRADIENT
    weights = ours.engine.export_state(MODEL_ID, optimizer=False).weights
    for name, array in ours.start.weights.items():
        np.testing.assert_array_equal(weights[name], array)
    ours.forward_backward(make_data(1, 1))
    assert math.isfinite(ours.engine.optim_step(MODEL_ID, ADAM)["grad_norm:last"])


def test_models_side_by_side_are_as_alone(ours: Ours, dtype: str) -> None:
    """A neighbour of another shape, its calls in between, changes nothing."""
    data = make_data(0, 3)
    alone = numbers(ours, data)
    ours.engine.create_model("neighbour", LoraConfig(rank=2, seed=3, train_mlp=False))
    logprobs = ours.forward_backward(data[:2])
    ours.engine.forward(Batch("neighbour", data, CrossEntropy(), backward=True), lambda _, __: None)
    ours.engine.optim_step("neighbour", ADAM)
    logprobs += ours.forward_backward(data[2:])
    found = compare((logprobs, ours.take_gradients()), alone)
    assert found.logprobs_abs <= CLOSE[dtype]
    assert found.gradients_rel <= CLOSE[dtype]


def test_a_saved_state_continues(ours: Ours, folders: Folders, dtype: str) -> None:
    """Export, files, import into a fresh engine: equal bits; then a step that agrees."""
    for seed in range(2):
        ours.forward_backward(make_data(seed, 2))
        ours.engine.optim_step(MODEL_ID, ADAM)
    state = ours.engine.export_state(MODEL_ID, optimizer=True)
    read = state_files.from_files(to_files(state), None)
    fresh = new_engine(folders("llama"), dtype)
    fresh.engine.import_state(MODEL_ID, read, optimizer=True)
    again = fresh.engine.export_state(MODEL_ID, optimizer=True)
    for name, array in [*state.weights.items(), *state.optimizer.items()]:
        np.testing.assert_array_equal({**again.weights, **again.optimizer}[name], array)
    steps = []
    for side in (ours, fresh):
        side.forward_backward(make_data(5, 2))
        assert side.engine.optim_step(MODEL_ID, ADAM)["step:last"] == 3
        steps.append(side.engine.export_state(MODEL_ID, optimizer=False).weights)
    for name, array in steps[0].items():
        np.testing.assert_allclose(steps[1][name], array, atol=1e-3)
