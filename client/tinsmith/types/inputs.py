"""What goes into calls. Shapes: N tokens of one datum, K targets per position.

Everything here is checked and copied when it is made: lists and arrays may be used again at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tinsmith import _check
from tinsmith._check import refuse, shown
from tinsmith.errors import InvalidArgumentError
from tinsmith.types._values import Value, owned
from tinsmith.types.provenance import ProvenanceSpan, check_tiling, spans_of
from tinsmith.types.tensor import TensorData, from_any, token_ids
from tinsmith.types.unsupported import CHUNKS

LossFnType = Literal["cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo"]


@dataclass(frozen=True, eq=False)
class EncodedTextChunk(Value):
    """A span of token ids.

    Args:
        tokens: Integers: a list, an array, a tensor, or what a tokenizer returns for one text.

    Raises:
        InvalidArgumentError: They are something else.
    """

    tokens: Sequence[int]
    type: Literal["encoded_text"] = "encoded_text"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", token_ids(self.tokens, "tokens").tolist())

    def copied(self) -> EncodedTextChunk:
        """Another one of the same tokens; quicker than by looking at each of them."""
        made = object.__new__(EncodedTextChunk)
        object.__setattr__(made, "tokens", list(self.tokens))
        object.__setattr__(made, "type", self.type)
        return made

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.tokens)


ModelInputChunk = EncodedTextChunk


@dataclass(frozen=True, eq=False)
class ModelInput(Value):
    """What a model reads: chunks, one after the other."""

    chunks: list[ModelInputChunk]

    def __post_init__(self) -> None:
        if isinstance(self.chunks, str | Mapping) or not isinstance(self.chunks, Iterable):
            raise refuse("chunks", f"expected a list of chunks, got {type(self.chunks).__name__}")
        object.__setattr__(self, "chunks", [owned(_chunk(chunk)) for chunk in self.chunks])
        for index, chunk in enumerate(self.chunks):
            if not isinstance(chunk, EncodedTextChunk):
                where = f"chunks[{index}]"
                raise refuse(where, f"expected an EncodedTextChunk, got {type(chunk).__name__}")

    @classmethod
    def from_ints(cls, tokens: Sequence[int]) -> ModelInput:
        """Make a prompt of token ids, as `EncodedTextChunk` takes them."""
        return cls([EncodedTextChunk(tokens)])

    @classmethod
    def empty(cls) -> ModelInput:
        """Make a prompt without any token."""
        return cls([])

    def to_ints(self) -> list[int]:
        """All token ids."""
        return [token for chunk in self.chunks for token in chunk.tokens]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return sum(chunk.length for chunk in self.chunks)

    def append(self, chunk: ModelInputChunk) -> ModelInput:
        """A new input with one more chunk."""
        return ModelInput([*self.chunks, chunk])

    def append_int(self, token: int) -> ModelInput:
        """A new input with one more token."""
        return self.append(EncodedTextChunk([_check.whole(token, "token")]))


def _chunk(given: Any) -> Any:
    """A chunk that may be given as a mapping, whose `type` says which."""
    if not isinstance(given, Mapping):
        return given
    kind = given.get("type", "encoded_text")
    return CHUNKS[kind]() if kind in CHUNKS else EncodedTextChunk.model_validate(given)


@dataclass(frozen=True, eq=False)
class Datum(Value):
    """One training example: position i of `model_input` predicts `target_tokens[i]`.

    Args:
        model_input: N tokens.
        loss_fn_inputs: Arrays that the loss reads, by name, each `(N,)`; for cross_entropy also
            `(N, K)`. numpy arrays, torch tensors, TensorData, or lists under known names. The name
            says what they are read as: `target_tokens` int64, what losses read besides float32.
            Booleans and any integers convert, exactly or not at all.
        model_input_spans: Where the tokens of `model_input` come from, as `with_provenance` takes
            it; kept, and not sent.
        loss_fn_input_spans: The same of the arrays. Both are given or neither.

    Raises:
        InvalidArgumentError: An argument is something else; `field` names the input.
    """

    model_input: ModelInput
    loss_fn_inputs: Mapping[str, Any] = field(default_factory=dict)
    model_input_spans: Sequence[ProvenanceSpan] | None = field(default=None, repr=False)
    loss_fn_input_spans: Sequence[ProvenanceSpan] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.model_input, Mapping):
            object.__setattr__(self, "model_input", ModelInput.model_validate(self.model_input))
        if not isinstance(self.model_input, ModelInput):
            kind = type(self.model_input).__name__
            raise refuse("model_input", f"expected a ModelInput, got {kind}")
        if not isinstance(self.loss_fn_inputs, Mapping):
            kind = type(self.loss_fn_inputs).__name__
            raise refuse("loss_fn_inputs", f"expected a mapping, got {kind}")
        read = {
            _check.text(name, "loss_fn_inputs"): from_any(name, value)
            for name, value in self.loss_fn_inputs.items()
        }
        object.__setattr__(self, "model_input", self.model_input.copied())
        object.__setattr__(self, "loss_fn_inputs", read)
        self._read_spans()

    def _read_spans(self) -> None:
        names = ("model_input_spans", "loss_fn_input_spans")
        given = [name for name in names if getattr(self, name) is not None]
        if not given:
            return
        for name in names:
            if name not in given:
                raise refuse(name, "is missing: both lists of spans are given or neither")
            object.__setattr__(self, name, spans_of(getattr(self, name), name))

    def with_provenance(
        self,
        model_input: Sequence[ProvenanceSpan],
        loss_fn_inputs: Sequence[ProvenanceSpan],
    ) -> Datum:
        """The same datum, which also says where its tokens come from.

        Args:
            model_input: Spans that cover the N tokens of `model_input`, in order.
            loss_fn_inputs: Spans that cover the N positions of `target_tokens`, in order.

        Raises:
            InvalidArgumentError: They do not cover exactly that (also a ValueError).
        """
        spans = spans_of(model_input, "model_input")
        check_tiling(spans, self.model_input.length, "model_input")
        others = spans_of(loss_fn_inputs, "loss_fn_inputs")
        if "target_tokens" in self.loss_fn_inputs:
            positions = len(self.loss_fn_inputs["target_tokens"])
            check_tiling(others, positions, "loss_fn_inputs")
        return replace(self, model_input_spans=spans, loss_fn_input_spans=others)


@dataclass(frozen=True, eq=False)
class SamplingParams(Value):
    """How tokens are drawn.

    Args:
        max_tokens: Most new tokens; None: as many as the context has room for.
        seed: Makes the samples repeatable, -2^63 to 2^64 - 1; None draws one.
        stop: String, strings or token ids that end a sequence (they stay in it), besides the
            model's end-of-sequence tokens. None: only those. An empty list: nothing does.
        temperature: 0 takes the most likely token.
        top_k: Draw among the k most likely tokens; -1 or 0: all.
        top_p: Draw among the most likely tokens whose probabilities reach this.

    Raises:
        InvalidArgumentError: An argument is no such thing.
    """

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | Sequence[str] | Sequence[int] | None = None
    temperature: float = 1
    top_k: int = -1
    top_p: float = 1

    def __post_init__(self) -> None:
        read = {
            "max_tokens": _check.optional_whole(self.max_tokens, "max_tokens", 1),
            "seed": _check.optional_whole(self.seed, "seed", most=_check.UINT64_MAX),
            "stop": _stops(self.stop),
            "temperature": _check.real(self.temperature, "temperature"),
            "top_k": _check.whole(self.top_k, "top_k", -1),
            "top_p": _check.real(self.top_p, "top_p"),
        }
        for name, value in read.items():
            object.__setattr__(self, name, value)


def _stops(stop: Any) -> str | list[str] | list[int] | None:
    if stop is None:
        return None
    if isinstance(stop, str):
        return _check.text(stop, "stop")
    if isinstance(stop, Mapping) or not isinstance(stop, Iterable):
        raise refuse("stop", f"expected a string, strings, or token ids, got {shown(stop)}")
    stops = list(stop)
    if all(isinstance(entry, str) for entry in stops):
        return [_check.text(entry, f"stop[{index}]") for index, entry in enumerate(stops)]
    if any(isinstance(entry, str) for entry in stops):
        raise refuse("stop", "expected strings or token ids, got both")
    return [_check.whole(entry, f"stop[{index}]") for index, entry in enumerate(stops)]


@dataclass(frozen=True, eq=False)
class LoraConfig(Value):
    """Shape of a LoRA adapter; alpha is 32.

    Raises:
        InvalidArgumentError: An argument is no such thing, or nothing is to be trained.
    """

    rank: int = 32
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", _check.whole(self.rank, "rank", 1, 2**31 - 1))
        seed = _check.optional_whole(self.seed, "seed", most=_check.UINT64_MAX)
        object.__setattr__(self, "seed", seed)
        parts = ("train_unembed", "train_mlp", "train_attn")
        for name in parts:
            object.__setattr__(self, name, _check.flag(getattr(self, name), name))
        if not any(getattr(self, name) for name in parts):
            message = "one of train_mlp, train_attn and train_unembed must be true"
            raise InvalidArgumentError(message, field="lora_config", reason="INVALID_FIELD")


@dataclass(frozen=True, eq=False)
class AdamParams(Value):
    """One AdamW step: decoupled weight decay, bias-corrected moments.

    Args:
        learning_rate: At least 0.
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay.
        grad_clip_norm: Clip the gradients to this global L2 norm; 0 switches it off.

    Raises:
        InvalidArgumentError: An argument is no finite number of 0 or more.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0

    def __post_init__(self) -> None:
        for each in fields(AdamParams):
            value = _check.real(getattr(self, each.name), each.name)
            if value < 0:
                raise refuse(each.name, f"{value} is not 0 or more")
            object.__setattr__(self, each.name, value)


@dataclass(frozen=True, eq=False)
class AdamOptimizerConfig(Value):
    """AdamW, the only optimizer there is."""

    type: Literal["adamw"] = "adamw"


OptimParams = AdamParams
OptimizerConfig = AdamOptimizerConfig


def int_tokens(model_input: ModelInput, where: str) -> NDArray[np.int64]:
    """A model input's tokens, int64 `(N,)`.

    Raises:
        InvalidArgumentError: It has none.
    """
    if not isinstance(model_input, ModelInput):
        raise refuse(where, f"expected a ModelInput, got {type(model_input).__name__}")
    parts = [
        token_ids(chunk.tokens, f"{where}.chunks[{index}].tokens")
        for index, chunk in enumerate(model_input.chunks)
    ]
    if not sum(map(len, parts)):
        raise refuse(where, "has no token", "MISSING_FIELD")
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def check_datum(datum: object, index: int) -> None:
    """Refuse what is no Datum."""
    if not isinstance(datum, Datum):
        raise refuse(f"data[{index}]", f"expected a Datum, got {type(datum).__name__}")


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
