"""The shared words: plain values that cross every floor of the house.

No gRPC, no protobuf, no torch: a scheduler, a catalogue and an engine can all speak these.
Shapes: `N` tokens of one datum, `K` targets per position.
"""

import functools
import hashlib
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from tinsmithd.loss_fns import LOSSES as LOSSES
from tinsmithd.loss_fns import CrossEntropy as CrossEntropy
from tinsmithd.loss_fns import LossFn as LossFn
from tinsmithd.owners import DEFAULT_OWNER as DEFAULT_OWNER
from tinsmithd.owners import GIVEN_ID_PATTERN
from tinsmithd.paths import MODEL_ID_PATTERN as MODEL_ID_PATTERN
from tinsmithd.paths import NAME_PATTERN as NAME_PATTERN
from tinsmithd.paths import CheckpointKind as CheckpointKind
from tinsmithd.paths import CheckpointPath as CheckpointPath
from tinsmithd.paths import is_ephemeral_name as is_ephemeral_name
from tinsmithd.paths import new_ephemeral_name as new_ephemeral_name
from tinsmithd.tunings import FullConfig as FullConfig
from tinsmithd.tunings import LoraConfig as LoraConfig
from tinsmithd.tunings import Tuning as Tuning


def new_model_id() -> str:
    """An id for a model whose creator chose none; nobody can guess it."""
    return secrets.token_hex(16)


def may_be_given_id(model_id: str) -> bool:
    """Whether an id is, but for upper and lower case, one that `new_model_id` may give."""
    return GIVEN_ID_PATTERN.fullmatch(model_id) is not None


# --- training ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Datum:
    """One training example.

    `tokens` is int64 `(N,)`; position i predicts `loss_fn_inputs["target_tokens"][i]`.
    Other inputs are float32 with the shape of `target_tokens`.
    """

    tokens: np.ndarray
    loss_fn_inputs: Mapping[str, np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes held by the arrays of this datum."""
        return self.tokens.nbytes + sum(a.nbytes for a in self.loss_fn_inputs.values())

    def completed(self, loss_fn: LossFn) -> "Datum":
        """This datum with what its caller left out of it, see `LossFn.ones`."""
        given = self.loss_fn_inputs
        missing = [name for name in loss_fn.ones if name not in given]
        if not missing or "target_tokens" not in given:
            return self
        ones = np.ones(given["target_tokens"].shape, np.float32)
        return Datum(self.tokens, {**given, **dict.fromkeys(missing, ones)})


@dataclass(frozen=True)
class AdamParams:
    """One step of AdamW with decoupled weight decay (Loshchilov & Hutter 2019)."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0
    """Global-norm clip over this model's gradients alone; 0 switches it off."""


@dataclass(frozen=True)
class BaseModelInfo:
    """What a loaded base model is: enough to check any request against it."""

    name: str
    architecture: str
    vocab_size: int
    context_length: int
    dtype: str
    layer_count: int
    parameter_count: int
    active_expert_count: int = 0
    """Experts that a token passes through in a layer that has some; 0 in a dense model."""


MOMENTS = ("exp_avg", "exp_avg_sq")
"""Kinds of Adam moments, as PyTorch names them: first and second."""


@dataclass(frozen=True)
class ModelState:
    """Everything that a checkpoint of a model holds.

    Attributes:
        tuning: What the model trains.
        weights: float32, in the names and shapes of PEFT's files for a LoRA adapter, and of
            Hugging Face's for a full model. A weight that two layers share is there once.
        optimizer: `exp_avg.<name>` and `exp_avg_sq.<name>` for each weight, float32; empty in a
            SAMPLER checkpoint and before the first step.
        step_count: Optimizer steps made.
        config: The content of `adapter_config.json`, as PEFT reads it, or of a full model's
            `config.json`.
        files: What else a Hugging Face folder has, by file name: the tokenizer's files of a full
            model. Empty for an adapter.
    """

    tuning: Tuning
    weights: Mapping[str, np.ndarray]
    optimizer: Mapping[str, np.ndarray]
    step_count: int
    config: Mapping[str, Any]
    files: Mapping[str, bytes] = field(default_factory=dict)


# --- sampling ---------------------------------------------------------------------------------


RANGE = "range"
"""Key of a field's `Range` in its metadata."""


@dataclass(frozen=True)
class Range:
    """The values that a number may have: from `low`, which `above_low` leaves out, to `high`."""

    low: float
    high: float = math.inf
    above_low: bool = False

    def problem(self, value: float) -> str:
        """What is wrong with a finite value; empty where nothing is."""
        too_low = value <= self.low if self.above_low else value < self.low
        if not too_low and value <= self.high:
            return ""
        if math.isinf(self.high) and not self.above_low:
            return f"{value:g} is below {self.low:g}"
        return f"{value:g} is not in {'(' if self.above_low else '['}{self.low:g}, {self.high:g}]"


@dataclass(frozen=True)
class SamplingParams:
    """How to draw tokens. Temperature 0 takes the argmax; `top_k` -1 or 0 means all tokens.

    A field with a `Range` has the same name in the contract, where it may be unset; nothing more
    is needed to read and to check it.
    """

    max_tokens: int
    temperature: float = field(default=1.0, metadata={RANGE: Range(0)})
    top_k: int = field(default=-1, metadata={RANGE: Range(-1)})
    top_p: float = field(default=1.0, metadata={RANGE: Range(0, 1, above_low=True)})
    seed: int | None = None
    stop_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    stop_at_eos: bool = True


@dataclass(frozen=True)
class SampleRequest:
    """A checked request for `num_samples` continuations of one prompt.

    Attributes:
        prompt: int64 `(P,)`.
        num_samples: How many continuations.
        params: How to draw them.
        include_prompt_logprobs: Give the logprobs of the prompt's tokens.
        topk_prompt_logprobs: Give so many most likely tokens at each prompt position, and the
            logprobs of the prompt's tokens, too.
        prompt_logprobs_last_n: From 1 to P - 1: both of those only at the last so many positions;
            the others are NaN. None: at all.
        target_prompt_logprobs: int64 `(P - 1, K)`: token ids whose logprobs are asked for; row i
            belongs to prompt position i + 1, -1 asks for nothing.
        prompt_alt_tokens_k: Draw so many tokens at each prompt position but the first.
        topk_sample_logprobs: Give so many most likely tokens with each sampled one.
        cache_salt: What is cached of prompts is shared by requests of one salt: how long a prompt
            takes says who sampled it before.
    """

    prompt: np.ndarray
    num_samples: int
    params: SamplingParams
    include_prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    prompt_logprobs_last_n: int | None = None
    target_prompt_logprobs: np.ndarray | None = None
    prompt_alt_tokens_k: int = 0
    topk_sample_logprobs: int = 0
    cache_salt: str = ""

    @property
    def logits_from(self) -> int:
        """The first of the prompt's tokens after which logits are needed, in [0, P).

        Position p is scored by the logits after token p - 1, and the first new token is drawn from
        those after token P - 1.
        """
        last = len(self.prompt) - 1
        if self.target_prompt_logprobs is not None or self.prompt_alt_tokens_k:
            return 0
        if self.include_prompt_logprobs or self.topk_prompt_logprobs:
            return last - min(last, self.prompt_logprobs_last_n or last)
        return last


class StopReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class TopKLogprobs:
    """The k most likely tokens at each of n positions, best first, the smaller id of equals.

    Where nothing was asked for, or fewer tokens than k can be drawn, a cell is empty: its id is 0
    and its logprob NaN. Row 0 of a prompt is empty, since nothing predicts it.

    Attributes:
        token_ids: int64 `(n, k)`; n is P for a prompt.
        logprobs: float32 `(n, k)`.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray


@dataclass(frozen=True)
class AltTokens:
    """k tokens drawn at each prompt position but the first, independently and with replacement.

    Drawn at the request's temperature from all tokens: `top_k` and `top_p` do not count. At
    temperature 0 they all are the most likely one. The same request gives the same ones.

    Attributes:
        token_ids: int64 `(P - 1, k)`; row i is for prompt position i + 1.
        logprobs: float32 `(P - 1, k)`, of the distribution drawn from; at temperature 0 those at
            temperature 1.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray


@dataclass(frozen=True)
class PromptScores:
    """What a prompt of P tokens was scored with, at temperature 1; None: not asked for.

    Attributes:
        logprobs: float32 `(P,)`, NaN at position 0 and before `prompt_logprobs_last_n`.
        topk: Of P rows.
        targets: float32, shaped like the request's `target_prompt_logprobs`; 0.0 where that is -1.
        alt_tokens: Drawn at the request's temperature.
    """

    logprobs: np.ndarray | None = None
    topk: TopKLogprobs | None = None
    targets: np.ndarray | None = None
    alt_tokens: AltTokens | None = None


@dataclass(frozen=True)
class SampledTokens:
    """New tokens of one sequence, in order.

    Attributes:
        sequence_index: Which sequence.
        tokens, logprobs: n of each; logprobs of the distribution that was drawn from.
        stop_reason: Set with the last ones.
        topk: `(n, k)`, of the same distributions as `logprobs`; None unless asked for.
    """

    sequence_index: int
    tokens: Sequence[int]
    logprobs: Sequence[float]
    stop_reason: StopReason | None = None
    topk: TopKLogprobs | None = None


@dataclass(frozen=True)
class Output:
    """Some of what a request made: its prompt's scores first, where asked for, then tokens.

    Attributes:
        prompt_scores: In one output of a request at most.
        tokens: New ones.
        prompt_cache_hit_tokens: Of the prompt's tokens those that were not computed again, but
            found in a cache: in the first output of a request; 0 in the others.
    """

    prompt_scores: PromptScores | None = None
    tokens: Sequence[SampledTokens] = ()
    prompt_cache_hit_tokens: int = 0


# --- checkpoints ------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of itself.

    Attributes:
        digest: Equal for equal files, see `content_digest`; 32 bytes.
        files: SHA-256 of each file, by name.
    """

    path: CheckpointPath
    kind: CheckpointKind
    base_model: str
    tuning: Tuning
    step_count: int
    size_bytes: int = 0
    digest: bytes = b""
    files: Mapping[str, bytes] = field(default_factory=dict)


def content_digest(files: Mapping[str, bytes]) -> bytes:
    """What a checkpoint holds, in 32 bytes: equal for equal files.

    Args:
        files: SHA-256 of each file, by name.
    """
    whole = hashlib.sha256()
    for name in sorted(files):
        whole.update(_digest_of_name(name) + files[name])
    return whole.digest()


@functools.lru_cache(maxsize=256)  # checkpoints have files of the same few names
def _digest_of_name(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
