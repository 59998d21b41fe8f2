"""What goes into calls. Shapes: N tokens of one datum, K targets per position."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from tinsmith.errors import InvalidArgumentError
from tinsmith.types.tensor import Like, TensorData, from_any

LossFnType = Literal["cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo"]


@dataclass(frozen=True)
class EncodedTextChunk:
    """A span of token ids."""

    tokens: Sequence[int]
    type: Literal["encoded_text"] = "encoded_text"

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.tokens)


ModelInputChunk = EncodedTextChunk


@dataclass(frozen=True)
class ModelInput:
    """What a model reads: chunks, one after the other."""

    chunks: list[ModelInputChunk]

    @classmethod
    def from_ints(cls, tokens: Sequence[int]) -> ModelInput:
        """From token ids."""
        return cls([EncodedTextChunk(list(tokens))])

    @classmethod
    def empty(cls) -> ModelInput:
        """Without any token."""
        return cls([])

    def to_ints(self) -> list[int]:
        """All token ids."""
        return [int(token) for chunk in self.chunks for token in chunk.tokens]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return sum(chunk.length for chunk in self.chunks)

    def append(self, chunk: ModelInputChunk) -> ModelInput:
        """A new input with one more chunk."""
        return ModelInput([*self.chunks, chunk])

    def append_int(self, token: int) -> ModelInput:
        """A new input with one more token."""
        return self.append(EncodedTextChunk([token]))


@dataclass(frozen=True)
class Datum:
    """One training example: position i of `model_input` predicts `target_tokens[i]`.

    Args:
        model_input: N tokens.
        loss_fn_inputs: Arrays that the loss reads, by name, each `(N,)`; for cross_entropy also
            `(N, K)`. numpy arrays, torch tensors, TensorData, or lists under known names.
    """

    model_input: ModelInput
    loss_fn_inputs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        read = {name: from_any(name, value) for name, value in self.loss_fn_inputs.items()}
        object.__setattr__(self, "loss_fn_inputs", read)

    @property
    def like(self) -> Like:
        """What its arrays were given as; results come back as the same."""
        kinds = {tensor.like for tensor in self.loss_fn_inputs.values()}
        return "torch" if "torch" in kinds else "numpy" if "numpy" in kinds else ""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn.

    Args:
        max_tokens: Most new tokens; None: as many as the context has room for.
        seed: Makes the samples repeatable; None draws one.
        stop: String, strings or token ids that end a sequence (they stay in it), besides the
            model's end-of-sequence tokens. None: only those. An empty list: nothing does.
        temperature: 0 takes the most likely token.
        top_k: Draw among the k most likely tokens; -1 or 0: all.
        top_p: Draw among the most likely tokens whose probabilities reach this.
    """

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | Sequence[str] | Sequence[int] | None = None
    temperature: float = 1
    top_k: int = -1
    top_p: float = 1


@dataclass(frozen=True)
class LoraConfig:
    """Shape of a LoRA adapter; alpha is 32."""

    rank: int = 32
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


@dataclass(frozen=True)
class AdamParams:
    """One AdamW step: decoupled weight decay, bias-corrected moments.

    Args:
        learning_rate: At least 0.
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay.
        grad_clip_norm: Clip the gradients to this global L2 norm; 0 switches it off.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not math.isfinite(value) or value < 0:
                raise InvalidArgumentError(f"{name}: {value} is not 0 or more", field=name)


@dataclass(frozen=True)
class AdamOptimizerConfig:
    """AdamW, the only optimizer there is."""

    type: Literal["adamw"] = "adamw"


OptimParams = AdamParams
OptimizerConfig = AdamOptimizerConfig


def int_tokens(model_input: ModelInput, where: str) -> np.ndarray:
    """A model input's tokens, int64 `(N,)`.

    Raises:
        InvalidArgumentError: It has none, or they are no integers.
    """
    parts = []
    for index, chunk in enumerate(model_input.chunks):
        if not isinstance(chunk, EncodedTextChunk):
            message = f"{where}.chunks[{index}]: only text chunks are supported"
            raise InvalidArgumentError(message, field=f"{where}.chunks[{index}]")
        part = np.asarray(chunk.tokens)
        if part.size and (part.dtype.kind not in "iu" or part.ndim != 1):
            message = f"{where}.chunks[{index}].tokens: expected a flat list of integers"
            raise InvalidArgumentError(message, field=f"{where}.chunks[{index}].tokens")
        parts.append(part.astype(np.int64))
    if not sum(map(len, parts)):
        raise InvalidArgumentError(f"{where}: has no token", field=where)
    return np.concatenate(parts)


__all__ = [
    "AdamOptimizerConfig",
    "AdamParams",
    "Datum",
    "EncodedTextChunk",
    "LoraConfig",
    "LossFnType",
    "ModelInput",
    "ModelInputChunk",
    "OptimParams",
    "OptimizerConfig",
    "SamplingParams",
    "TensorData",
]
