"""What sampling gives: numpy arrays, and lists made of them. P tokens of a prompt, N new ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tinsmith.types._values import Response
from tinsmith.types.tensor import TensorData

StopReason = Literal["length", "stop"]
SamplingClientKind = Literal["snapshot", "inflight"]
EMPTY_LOGPROB = -99999.0
"""Stands with token 0 in a cell of `TopkLogprobs` that has nothing, as in Tinker."""


@dataclass(frozen=True, eq=False)
class TopkLogprobs(Response):
    """The k most likely tokens at each position, best first: int32 and float32 `(N, k)`.

    Cells without a token have id 0 and logprob -99999.
    """

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]

    def rows(self) -> list[list[tuple[int, float]] | None]:
        """(token, logprob) pairs at each position without the empty cells; None without any."""
        counts = (self.logprobs != EMPTY_LOGPROB).sum(1).tolist()
        return [
            list(zip(ids[:count], logprobs[:count], strict=True)) if count else None
            for ids, logprobs, count in zip(
                self.token_ids.tolist(), self.logprobs.tolist(), counts, strict=True
            )
        ]


@dataclass(frozen=True, eq=False)
class PromptAltTokens(Response):
    """Tokens drawn at prompt positions 1 to P - 1, row i at position i + 1.

    Attributes:
        tokens: int64 `(P - 1, k)`, drawn independently at the request's temperature.
        logprobs: float32 `(P - 1, k)`, of the distribution drawn from.
    """

    tokens: NDArray[np.int64]
    logprobs: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class SampledSequence(Response):
    """One sample.

    Attributes:
        stop_reason: "stop", or "length" after `max_tokens`.
        sequence_id: No other sequence has it.
        tokens_np: int32 `(N,)`; with the tokens that completed a stop.
        logprobs_np: float32 `(N,)`, of the distribution that was sampled from; None where nobody
            knows them.
        topk_logprobs_np: Of the same distributions; None unless asked for.
    """

    stop_reason: StopReason
    sequence_id: str
    tokens_np: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    logprobs_np: NDArray[np.float32] | None = None
    topk_logprobs_np: TopkLogprobs | None = None

    @property
    def tokens(self) -> list[int]:
        """Token ids."""
        return [int(token) for token in self.tokens_np]

    @property
    def logprobs(self) -> list[float] | None:
        """Logprob of each token."""
        found = self.logprobs_np
        return None if found is None else [float(logprob) for logprob in found]

    @property
    def topk_logprobs(self) -> list[list[tuple[int, float]] | None] | None:
        """(token, logprob) pairs at each token, best first."""
        found = self.topk_logprobs_np
        return None if found is None else found.rows()


@dataclass(frozen=True, eq=False)
class SampleResponse(Response):
    """Result of sample.

    Attributes:
        sequences: `num_samples` of them.
        prompt_logprobs_np: float32 `(P,)`, NaN at position 0 and before `prompt_logprobs_last_n`;
            None unless asked for.
        topk_prompt_logprobs_np: P rows, empty where `prompt_logprobs_np` is NaN; None unless asked
            for.
        target_prompt_logprobs: float32, shaped like the argument, and 0.0 where that has no token;
            None unless asked for.
        prompt_cache_hit_tokens: Tokens of the prompt that the server found in a cache.
        prompt_alt_tokens: None unless asked for.
    """

    sequences: list[SampledSequence]
    prompt_logprobs_np: NDArray[np.float32] | None = None
    topk_prompt_logprobs_np: TopkLogprobs | None = None
    target_prompt_logprobs: TensorData | None = None
    prompt_cache_hit_tokens: int = 0
    prompt_alt_tokens: PromptAltTokens | None = None

    @property
    def prompt_logprobs(self) -> list[float | None] | None:
        """Logprob of each prompt token; None at position 0."""
        if self.prompt_logprobs_np is None:
            return None
        return nan_to_none(self.prompt_logprobs_np)

    @property
    def topk_prompt_logprobs(self) -> list[list[tuple[int, float]] | None] | None:
        """(token, logprob) pairs at each prompt position, best first; None at position 0."""
        found = self.topk_prompt_logprobs_np
        return None if found is None else found.rows()


def nan_to_none(values: NDArray[np.float32]) -> list[float | None]:
    """A list with None for NaN."""
    return [None if np.isnan(value) else float(value) for value in values]


@dataclass(frozen=True, eq=False)
class SampledTokens(Response):
    """New tokens of one sequence, from `sample_stream`; `stop_reason` comes with its last."""

    sequence_index: int
    tokens: Sequence[int]
    logprobs: Sequence[float]
    stop_reason: StopReason | None = None
