"""What a training engine must do: one suite, every engine.

`plain_loop` is the loop that a user would have written with transformers, PEFT and torch.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from suite import ADAM, ENGINES, LORA, difference, new_engine, train, weights_of
from transformers import AutoModelForCausalLM

from data import collect, make_data, make_rl_data
from plain_loop import train_plainly
from tinsmithd.domain import (
    AdamParams,
    CrossEntropy,
    Datum,
    LoraConfig,
    ModelState,
)
from tinsmithd.errors import FailedPrecondition, Reason
from tinsmithd.loss_fns import ImportanceSampling, Ppo
from tinsmithd.trainer.engines.interface import Batch, TrainingEngine
from tiny_models import FAMILIES

# --- against the loop that it replaces --------------------------------------------------------


def plain_loop(
    folder: Path, start: ModelState, batches: Sequence[Sequence[Datum]], adam: AdamParams
) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses and final weights of an ordinary training loop from the same first weights."""
    config = peft.LoraConfig(
        **{k: start.config[k] for k in ("r", "lora_alpha", "target_modules", "task_type")},
        target_parameters=start.config["target_parameters"],
    )
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = peft.get_peft_model(base, config)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in start.weights.items()}
    loaded = peft.set_peft_model_state_dict(model, tensors)
    assert not loaded.unexpected_keys
    losses = train_plainly(model, batches, adam)
    # A saved head must not bring the weights of the base along.
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return losses, {name: tensor.numpy() for name, tensor in state.items()}


@pytest.mark.parametrize("family", [*FAMILIES, "llama-tied"])
@pytest.mark.parametrize("name", ENGINES)
def test_it_computes_what_a_plain_loop_computes(
    folders: Callable[[str], Path], name: str, family: str
) -> None:
    """Weights to 1e-6 after mixed accumulation, decay and clipping, at a large eps."""
    folder = folders(family)
    engine = new_engine(name, folder)
    engine.create_model("m", LORA)
    start = engine.export_state("m", optimizer=False)
    batches = [make_data(seed, count) for seed, count in enumerate((1, 3, 2, 2))]
    adam = AdamParams(learning_rate=1e-2, eps=0.1, weight_decay=0.1, grad_clip_norm=50.0)
    losses = train(engine, "m", batches, adam)
    expected_losses, expected = plain_loop(folder, start, batches, adam)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert difference(weights_of(engine, "m"), expected) <= 1e-6
    assert difference(weights_of(engine, "m"), start.weights) > 1e-3


@pytest.mark.parametrize("family", list(FAMILIES))
def test_engines_agree(folders: Callable[[str], Path], family: str) -> None:
    """Weights to 1e-6 at eps 0.1; losses to 1e-5 at eps 1e-12, where Adam amplifies rounding.

    Experts to 2e-6: the engines sum rows in another order, which without AVX-512 makes 1.3e-6.
    """
    most = 2e-6 if family == "qwen3_moe" else 1e-6
    batches = [make_data(seed, 3) for seed in range(6)]
    for adam in (ADAM, AdamParams(learning_rate=1e-3, eps=1e-12)):
        losses, weights = [], []
        for name in ENGINES:
            engine = new_engine(name, folders(family))
            engine.create_model("m", LORA)
            losses.append(train(engine, "m", batches, adam))
            weights.append(weights_of(engine, "m"))
        if adam.eps == 0.1:
            assert difference(*weights) <= most
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# --- accumulation, steps, order ---------------------------------------------------------------


def test_a_then_b_is_a_and_b(engine: TrainingEngine) -> None:
    """Gradients accumulate: two calls are one call with both data."""
    data = make_data(0, 5)
    for model_id in ("two", "one"):
        engine.create_model(model_id, LORA)
    collect(engine, "two", data[:2], backward=True)
    collect(engine, "two", data[2:], backward=True)
    collect(engine, "one", data, backward=True)
    norms = [engine.optim_step(m, ADAM)["grad_norm:last"] for m in ("two", "one")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert difference(weights_of(engine, "two"), weights_of(engine, "one")) <= 1e-6


def test_data_computed_together_do_not_see_each_other(folders: Callable[[str], Path]) -> None:
    """Packed in one forward, each datum's logprobs are those that it has alone; and no gradient
    passes from one to another."""
    for family in FAMILIES:
        engine = new_engine("deepspeed", folders(family))
        engine.create_model("m", LORA)
        data = [*make_data(0, 4), *make_data(0, 2), *make_data(5, 1, targets=3)]
        _, together = collect(engine, "m", data, backward=True)
        engine.optim_step("m", AdamParams(learning_rate=0.0))
        for datum, found in zip(data, together, strict=True):
            _, (alone,) = collect(engine, "m", [datum], backward=False)
            np.testing.assert_allclose(found, alone, atol=2e-5)
        for datum in data:
            datum.loss_fn_inputs["weights"][:] = 0
        collect(engine, "m", data, backward=True)
        data[1].loss_fn_inputs["weights"][:] = 1
        collect(engine, "m", data, backward=True)
        packed = engine.optim_step("m", AdamParams(learning_rate=0.0))["grad_norm:last"]
        collect(engine, "m", [data[1]], backward=True)
        alone_norm = engine.optim_step("m", AdamParams(learning_rate=0.0))["grad_norm:last"]
        assert packed == pytest.approx(alone_norm, rel=1e-5)


def test_learning_rate_zero_changes_nothing(engine: TrainingEngine) -> None:
    """Weights stay bit for bit; the gradients are used up."""
    engine.create_model("m", LORA)
    before = weights_of(engine, "m")
    collect(engine, "m", make_data(0, 2), backward=True)
    engine.optim_step("m", AdamParams(learning_rate=0.0))
    assert difference(before, weights_of(engine, "m")) == 0
    assert engine.optim_step("m", AdamParams(learning_rate=0.0))["grad_norm:last"] == 0


def test_forward_leaves_no_trace(engine: TrainingEngine) -> None:
    """No gradient waits after it, and its logprobs are those of forward_backward."""
    engine.create_model("m", LORA)
    data = make_data(0, 3)
    forward = collect(engine, "m", data, backward=False)
    assert engine.optim_step("m", ADAM)["grad_norm:last"] == 0
    engine.create_model("n", LORA)
    backward = collect(engine, "n", data, backward=True)
    assert forward[0] == backward[0]
    for a, b in zip(forward[1], backward[1], strict=True):
        np.testing.assert_array_equal(a, b)


def test_results_come_in_order_as_they_are_computed(engine: TrainingEngine) -> None:
    """One result per datum, shaped like its targets, (N, K) too."""
    engine.create_model("m", LORA)
    data = [*make_data(0, 2), *make_data(1, 1, targets=3)]
    seen: list[tuple[int, tuple[int, ...]]] = []
    engine.forward(
        Batch("m", data, CrossEntropy(), backward=True),
        lambda i, outputs: seen.append((i, outputs["logprobs"].shape)),
    )
    assert seen == [(i, d.loss_fn_inputs["target_tokens"].shape) for i, d in enumerate(data)]


def test_wide_targets_are_the_sum_of_narrow_ones(engine: TrainingEngine) -> None:
    """(N, K) cross-entropy equals K calls with (N,) targets."""
    wide = make_data(3, 1, targets=2)[0]
    columns = [
        Datum(wide.tokens, {k: v[:, i] for k, v in wide.loss_fn_inputs.items()}) for i in range(2)
    ]
    for model_id, data in (("wide", [wide]), ("narrow", columns)):
        engine.create_model(model_id, LORA)
        collect(engine, model_id, data, backward=True)
        engine.optim_step(model_id, ADAM)
    assert difference(weights_of(engine, "wide"), weights_of(engine, "narrow")) <= 1e-6


def test_own_logprobs_give_minus_the_advantages(engine: TrainingEngine) -> None:
    """importance_sampling and ppo at ratio 1."""
    engine.create_model("m", LORA)
    _, logprobs = collect(engine, "m", make_data(0, 3), backward=False)
    data = make_rl_data(0, make_data(0, 3), logprobs)
    expected = -sum(float(d.loss_fn_inputs["advantages"].sum()) for d in data)
    for loss in (ImportanceSampling(), Ppo()):
        metrics, _ = collect(engine, "m", data, loss, backward=True)
        assert metrics["loss:sum"] == pytest.approx(expected, abs=1e-5)


def test_models_side_by_side_are_as_alone(engine: TrainingEngine) -> None:
    """Different rank, targets and settings, calls interleaved: bit-identical to each alone."""
    shapes = {
        "a": LoraConfig(rank=4, seed=1),
        "b": LoraConfig(rank=2, seed=2, train_mlp=False, train_unembed=False),
        "c": LoraConfig(rank=3, seed=3, train_attn=False),
    }
    batches = [make_data(seed, 2) for seed in range(4)]
    for model_id, lora in shapes.items():
        engine.create_model(model_id, lora)
    for index, batch in enumerate(batches):
        for model_id in shapes:
            collect(engine, model_id, batch, backward=True)
        if index % 2:
            for model_id in shapes:
                engine.optim_step(model_id, ADAM)
    together = {model_id: weights_of(engine, model_id) for model_id in shapes}
    for model_id, lora in shapes.items():
        engine.create_model(f"{model_id} alone", lora)
        train(engine, f"{model_id} alone", batches)
        assert difference(together[model_id], weights_of(engine, f"{model_id} alone")) == 0


def test_the_same_seed_gives_the_same_start(engine: TrainingEngine) -> None:
    """A is drawn from the seed, B is zero, whatever was made before."""
    for model_id, seed in (("a", 5), ("other", 6), ("b", 5)):
        engine.create_model(model_id, LoraConfig(rank=4, seed=seed))
    a, b, other = (weights_of(engine, m) for m in ("a", "b", "other"))
    assert difference(a, b) == 0
    assert difference(a, other) > 0
    for name, array in a.items():
        if ".lora_B." in name:
            assert not array.any()
        else:
            assert 0.5 / math.sqrt(array.shape[1]) < np.abs(array).max() <= array.shape[1] ** -0.5


# --- failure leaves no trace ------------------------------------------------------------------


def test_a_failed_call_adds_nothing(engine: TrainingEngine) -> None:
    """A failure in the middle of a call leaves the waiting gradients as they were."""
    data = make_data(0, 4)

    def fail(index: int, _: object) -> None:
        if index == 2:
            raise RuntimeError("lost")

    for model_id in ("disturbed", "calm"):
        engine.create_model(model_id, LORA)
        collect(engine, model_id, data[:1], backward=True)
    with pytest.raises(RuntimeError, match="lost"):
        engine.forward(Batch("disturbed", data, CrossEntropy(), backward=True), fail)
    for model_id in ("disturbed", "calm"):
        engine.optim_step(model_id, ADAM)
    assert difference(weights_of(engine, "disturbed"), weights_of(engine, "calm")) == 0


def test_a_non_finite_gradient_is_refused_and_cleared(engine: TrainingEngine) -> None:
    """Weights and moments stay; the next step works."""
    engine.create_model("m", LORA)
    collect(engine, "m", make_data(0, 1), backward=True)
    engine.optim_step("m", ADAM)
    before = engine.export_state("m", optimizer=True)
    bad = make_data(1, 1)[0]
    bad.loss_fn_inputs["weights"][0] = np.float32(3e38)
    collect(engine, "m", [bad, bad], backward=True)
    with pytest.raises(FailedPrecondition) as refusal:
        engine.optim_step("m", ADAM)
    assert refusal.value.reason is Reason.NON_FINITE_GRADIENT
    after = engine.export_state("m", optimizer=True)
    assert difference(before.weights, after.weights) == 0
    assert difference(before.optimizer, after.optimizer) == 0
    assert engine.optim_step("m", ADAM)["step:last"] == 2


@pytest.mark.parametrize("steps_before", [0, 1])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_finite_gradients_with_an_infinite_norm_are_refused(
    engine: TrainingEngine, clip: float, steps_before: int
) -> None:
    """Their squares do not fit float32: no step is counted, weights and moments stay."""
    engine.create_model("m", LORA)
    for _ in range(steps_before):
        collect(engine, "m", make_data(0, 1), backward=True)
        engine.optim_step("m", ADAM)
    before = engine.export_state("m", optimizer=True)
    large = make_data(1, 1)[0]
    large.loss_fn_inputs["weights"][:] = np.float32(1e25)
    metrics, _ = collect(engine, "m", [large], backward=True)
    assert math.isfinite(metrics["loss:sum"])
    with pytest.raises(FailedPrecondition) as refusal:
        engine.optim_step("m", AdamParams(learning_rate=1e-2, grad_clip_norm=clip))
    assert refusal.value.reason is Reason.NON_FINITE_GRADIENT
    after = engine.export_state("m", optimizer=True)
    assert difference(before.weights, after.weights) == 0
    assert before.optimizer.keys() == after.optimizer.keys()
    for name, moment in before.optimizer.items():
        np.testing.assert_array_equal(moment, after.optimizer[name])
    collect(engine, "m", make_data(2, 1), backward=True)
    metrics = engine.optim_step("m", ADAM)
    assert metrics["step:last"] == after.step_count + 1 == steps_before + 1
    assert 0 < metrics["grad_norm:last"] < math.inf
