"""The two sides of a row: this project's engine, and the loop that a user would have written."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from bench.harness import Agreement, compare
from engines import make_engine
from tinsmithd.config import TrainerConfig
from tinsmithd.domain import AdamParams, CrossEntropy, Datum, LoraConfig, ModelState
from tinsmithd.modeling.base import DTYPES
from tinsmithd.trainer.engines.interface import Batch, TrainingEngine

MODEL_ID = "bench"
LORA = LoraConfig(rank=16, train_unembed=False)
"""PEFT's "all-linear": every linear layer but the output head."""
B_STANDARD_DEVIATION = 0.02

READ_GRADIENTS = AdamParams(learning_rate=0.0, beta1=0.0)
"""A step that moves no weight and leaves the gradients, exactly, as first moments."""


@dataclass(frozen=True)
class Settings:
    """How to run rows.

    Attributes:
        models: Where model folders are written and kept.
        pairs: Rounds of each measurement.
        threads: Of torch, both sides.
        shape: Instead of the rows' own shapes, by name; "" for those.
        zero_stage: Of the engine.
        micro_batch_tokens_max: Of the engine; None takes its default.
        base_model: The real model of the sampling rows.
        new_tokens_max: No sequence of those is made longer, for a look whether a row runs; None
            leaves them as they are.
    """

    models: Path
    pairs: int = 9
    threads: int = 1
    shape: str = ""
    zero_stage: int = TrainerConfig.model_fields["zero_stage"].default
    micro_batch_tokens_max: int | None = None
    base_model: Path = Path(".models/SmolLM2-135M-Instruct")
    new_tokens_max: int | None = None


class Ours:
    """The DeepSpeed engine with one model whose gradients all matter.

    Attributes:
        engine: The engine.
        start: The model's first weights. B is not zero there, else A would have no gradient.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        *,
        lora: LoraConfig = LORA,
        dtype: str = "float32",
    ) -> None:
        budget = settings.micro_batch_tokens_max
        self.engine: TrainingEngine = make_engine(
            "deepspeed",
            str(folder),
            dtype=dtype,
            zero_stage=settings.zero_stage,
            **({} if budget is None else {"micro_batch_tokens_max": budget}),
            on_progress=lambda _: None,
        )
        self.engine.create_model(MODEL_ID, lora)
        self.start = _with_random_b(self.engine.export_state(MODEL_ID, optimizer=False))
        self.reset()

    def reset(self) -> None:
        """Begin anew with the first weights."""
        self.engine.import_state(MODEL_ID, self.start, optimizer=False)

    def forward_backward(self, data: Sequence[Datum]) -> list[np.ndarray]:
        """Add gradients to those waiting; returns each datum's logprobs."""
        logprobs: list[np.ndarray] = []
        self.engine.forward(
            Batch(MODEL_ID, data, CrossEntropy(), backward=True),
            lambda _, outputs: logprobs.append(outputs["logprobs"]),
        )
        return logprobs

    def clear(self) -> None:
        """Drop waiting gradients; weights stay."""
        self.engine.optim_step(MODEL_ID, AdamParams(learning_rate=0.0))

    def take_gradients(self) -> dict[str, np.ndarray]:
        """The waiting gradients by parameter name; they are dropped, and so are the moments."""
        self.engine.optim_step(MODEL_ID, READ_GRADIENTS)
        found = self.engine.export_state(MODEL_ID, optimizer=True).optimizer
        self.reset()
        prefix = "exp_avg."
        return {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}


class BareLoop:
    """Transformers, PEFT and torch, used as their manuals say; no dropout.

    Args:
        folder: The model.
        start: The adapter's first weights.
        recompute: Keep only each layer's input, and compute the layer again on the way back.

    Attributes:
        parameters: The adapter's, by their names in PEFT's files.
    """

    def __init__(
        self,
        folder: Path,
        start: ModelState,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        recompute: bool = False,
    ) -> None:
        base = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], attn_implementation="sdpa"
        )
        given = ("r", "lora_alpha", "rank_pattern", "target_modules", "target_parameters")
        config = peft.LoraConfig(task_type="CAUSAL_LM", **{key: start.config[key] for key in given})
        with warnings.catch_warnings():
            # Of an attribute's old name, and that a head which is adapted shares its weight.
            warnings.simplefilter("ignore")
            self._model: Any = peft.get_peft_model(base, config).eval().to(device)
        if recompute:
            # It takes effect in training mode only; these shapes have nothing that drops out.
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
            self._model.train()
        tensors = {name: torch.from_numpy(array.copy()) for name, array in start.weights.items()}
        loaded = peft.set_peft_model_state_dict(self._model, tensors)
        assert not loaded.unexpected_keys
        self._device = device
        self.parameters: dict[str, torch.nn.Parameter] = {
            name.replace(".default.", "."): parameter
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad
        }
        assert self.parameters.keys() == start.weights.keys()

    def padded(self, data: Sequence[Datum]) -> list[np.ndarray]:
        """One forward and backward of all data, padded on the right to the longest.

        Under causal attention no real token sees the padding, so no attention mask is given: with
        one, transformers would take a slower kernel.
        """
        width = max(len(datum.tokens) for datum in data)
        tokens = torch.zeros(len(data), width, dtype=torch.int64)
        targets, weights = torch.zeros_like(tokens), torch.zeros(len(data), width)
        for row, datum in enumerate(data):
            here = (row, slice(len(datum.tokens)))
            tokens[here] = torch.from_numpy(datum.tokens)
            targets[here] = torch.from_numpy(datum.loss_fn_inputs["target_tokens"])
            weights[here] = torch.from_numpy(datum.loss_fn_inputs["weights"])
        logits = self._model(tokens.to(self._device), use_cache=False).logits
        losses = functional.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten().to(self._device), reduction="none"
        ).view(targets.shape)
        (losses * weights.to(self._device)).sum().backward()
        rows = (-losses.detach()).cpu().numpy()
        return [row[: len(datum.tokens)] for row, datum in zip(rows, data, strict=True)]

    def one_by_one(self, data: Sequence[Datum]) -> list[np.ndarray]:
        """One forward and backward for each datum."""
        return [self.padded([datum])[0] for datum in data]

    def clear(self) -> None:
        """Drop the gradients."""
        self._model.zero_grad(set_to_none=True)

    def take_gradients(self) -> dict[str, np.ndarray]:
        """The gradients by parameter name; they are dropped."""
        found = {
            name: torch.zeros_like(p).cpu().numpy() if p.grad is None else p.grad.cpu().numpy()
            for name, p in self.parameters.items()
        }
        self.clear()
        return found


def agree(
    ours: Ours,
    bare: BareLoop,
    batches: Sequence[Sequence[Datum]],
    *,
    one_by_one: bool = False,
) -> Agreement:
    """Logprobs and summed gradients of some batches on both sides; nothing waits afterwards."""
    ours.reset()
    bare.clear()
    our_logprobs = [lp for batch in batches for lp in ours.forward_backward(batch)]
    loop = bare.one_by_one if one_by_one else bare.padded
    logprobs = [lp for batch in batches for lp in loop(batch)]
    return compare((our_logprobs, ours.take_gradients()), (logprobs, bare.take_gradients()))


def _with_random_b(state: ModelState) -> ModelState:
    rng = np.random.default_rng(1)
    weights: Mapping[str, np.ndarray] = {
        name: rng.normal(0, B_STANDARD_DEVIATION, array.shape).astype(np.float32)
        if ".lora_B." in name
        else array
        for name, array in sorted(state.weights.items())
    }
    return replace(state, weights=weights)
