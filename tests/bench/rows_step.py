"""Rows 9 and 26: what `optim_step` costs, and what idle models cost."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from bench import workloads
from bench.configs import SHAPES, write_model
from bench.harness import Agreement, Result, Side, compare, measure, middle, ratio
from bench.sides import LORA, MODEL_ID, BareLoop, Ours, Settings
from tinsmithd.domain import AdamParams, CrossEntropy, Datum, LoraConfig
from tinsmithd.trainer.engines.interface import Batch

STEP_TARGET = 1.10
IDLE_TARGET = 1.02
IDLE_MODELS = (1, 256)
IDLE_LORA = LoraConfig(rank=4, train_unembed=False)
STEP_TOKENS = 16
ROUNDS_PER_PAIR = 3
"""A step takes milliseconds: rounds are cheap and noise is large."""

ADAM = AdamParams(learning_rate=1e-5, eps=1e-8)
CLIP_NORM = 1.0
CHECKED = AdamParams(learning_rate=1e-2, eps=1e-3, weight_decay=0.1, grad_clip_norm=CLIP_NORM)
"""For the agreement: with a small eps AdamW would hide a wrong scale of the gradients."""


class FusedAdamW:
    """torch's fused AdamW on the bare loop's adapter."""

    def __init__(self, bare: BareLoop, adam: AdamParams) -> None:
        self._parameters = list(bare.parameters.values())
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=adam.learning_rate,
            betas=(adam.beta1, adam.beta2),
            eps=adam.eps,
            weight_decay=adam.weight_decay,
            fused=True,
        )

    def step(self) -> None:
        """Apply the gradients."""
        self._optimizer.step()

    def clip_and_step(self) -> None:
        """Clip the gradients' norm and apply them."""
        torch.nn.utils.clip_grad_norm_(self._parameters, CLIP_NORM)
        self._optimizer.step()


def optim_step(settings: Settings) -> list[Result]:
    """Row 9, at two sizes."""
    results = []
    for name, rank in (("S", LORA.rank), ("smollm2-135m", 32)):
        lora = replace(LORA, rank=rank)
        results += _optim_step_of(settings.shape or name, lora, settings)
    return results


def _optim_step_of(name: str, lora: LoraConfig, settings: Settings) -> list[Result]:
    shape = SHAPES[name]
    folder = write_model(shape, settings.models)
    ours = Ours(folder, settings, lora=lora)
    bare = BareLoop(folder, ours.start)
    batch = workloads.make_batch([STEP_TOKENS], shape.vocab)
    agreement = _steps_agree(ours, bare, batch)
    fused = FusedAdamW(bare, ADAM)

    def our_gradients() -> None:
        ours.forward_backward(batch)

    def bare_gradients() -> None:
        bare.clear()
        bare.padded(batch)

    clipping = replace(ADAM, grad_clip_norm=CLIP_NORM)
    compared = {
        "fused AdamW": (ADAM, fused.step),
        "clip_grad_norm_ + fused AdamW": (clipping, fused.clip_and_step),
    }
    sides = []
    for loop, (adam, step) in compared.items():
        ours_step = partial(ours.engine.optim_step, MODEL_ID, adam)
        sides += [
            Side(f"ours / {loop}", ours_step, our_gradients),
            Side(loop, step, bare_gradients),
        ]
    timings = measure(sides, settings.pairs * ROUNDS_PER_PAIR, warm_ups=3)
    arrays = ours.start.weights.values()
    return [
        Result(
            "9",
            f"optim_step, {name} rank {lora.rank} / {loop}",
            ratio(timings[f"ours / {loop}"], timings[loop]),
            target=STEP_TARGET,
            sides={"ours": middle(timings[f"ours / {loop}"]), loop: middle(timings[loop])},
            agreement=agreement,
            notes=f"{sum(a.size for a in arrays) / 1e6:.2f} M parameters in {len(arrays)} tensors;"
            " ours also measures the norm and refuses what is not finite",
        )
        for loop in compared
    ]


def _steps_agree(ours: Ours, bare: BareLoop, batch: Sequence[Datum]) -> Agreement:
    """Logprobs, and in the gradients' place the weights' way, over two steps on both sides.

    The second step has gradients of zero: after a step so large, those of a deep random model would
    blow up what rounding left of the first.
    """
    fused = FusedAdamW(bare, CHECKED)
    ours.reset()
    our_logprobs = ours.forward_backward(batch)
    bare.clear()
    logprobs = bare.padded(batch)
    for _ in range(2):
        ours.engine.optim_step(MODEL_ID, CHECKED)
        fused.clip_and_step()
        for parameter in bare.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
    start = ours.start.weights
    weights = ours.engine.export_state(MODEL_ID, optimizer=False).weights
    moved = {name: weights[name] - array for name, array in start.items()}
    expected = {
        name: parameter.detach().numpy() - start[name]
        for name, parameter in bare.parameters.items()
    }
    ours.reset()
    return compare((our_logprobs, moved), (logprobs, expected))


def idle_models(settings: Settings) -> list[Result]:
    """Row 26: the same step beside one and many idle models."""
    shape = SHAPES[settings.shape or "T"]
    folder = write_model(shape, settings.models)
    batch = workloads.make_batch([STEP_TOKENS * 4], shape.vocab)
    sides = {f"{count} idle": Ours(folder, settings, lora=IDLE_LORA) for count in IDLE_MODELS}
    for count, ours in zip(IDLE_MODELS, sides.values(), strict=True):
        for index in range(count):
            _add_idle(ours, f"idle {index}", batch)
    few, many = ((ours.forward_backward(batch), ours.take_gradients()) for ours in sides.values())

    def step(ours: Ours) -> None:
        ours.forward_backward(batch)
        ours.engine.optim_step(MODEL_ID, ADAM)

    timings = measure(
        [Side(name, lambda o=ours: step(o)) for name, ours in sides.items()],
        settings.pairs * ROUNDS_PER_PAIR,
        warm_ups=3,
    )
    few_name, many_name = sides
    return [
        Result(
            "26",
            f"forward_backward + optim_step, {many_name} models / {few_name}",
            ratio(timings[many_name], timings[few_name]),
            target=IDLE_TARGET,
            sides={name: middle(found) for name, found in timings.items()},
            agreement=compare(many, few),
            notes="in an engine of its own each; idle models were trained for a step",
        )
    ]


def _add_idle(ours: Ours, model_id: str, batch: Sequence[Datum]) -> None:
    ours.engine.create_model(model_id, IDLE_LORA)
    ours.engine.forward(Batch(model_id, batch, CrossEntropy(), backward=True), lambda _, __: None)
    ours.engine.optim_step(model_id, ADAM)
