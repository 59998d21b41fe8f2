"""Puts the pieces of a `Sample` stream together."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinsmith import tensors
from tinsmith._convert import STOP_REASONS
from tinsmith.errors import DataLossError
from tinsmith.types.samples import (
    EMPTY_LOGPROB,
    PromptAltTokens,
    SampledSequence,
    SampledTokens,
    SampleResponse,
    StopReason,
    TopkLogprobs,
)
from tinsmith.types.tensor import TensorData, in_layout_of
from tinsmith.v1 import sampler_service_pb2 as pb
from tinsmith.v1 import types_pb2


@dataclass
class _Pieces:
    """What came of one sequence."""

    tokens: list[NDArray[Any]] = field(default_factory=list)
    logprobs: list[NDArray[Any]] = field(default_factory=list)
    topk: list[TopkLogprobs] = field(default_factory=list)
    stop_reason: StopReason = "length"

    def add(self, delta: pb.SequenceDelta) -> None:
        self.tokens.append(tensors.decode(delta.tokens))
        self.logprobs.append(tensors.decode(delta.logprobs))
        if delta.HasField("topk_token_ids"):
            self.topk.append(_topk(delta.topk_token_ids, delta.topk_logprobs))
        self.stop_reason = STOP_REASONS.get(delta.stop_reason, self.stop_reason)

    def sequence(self, sequence_id: str) -> SampledSequence:
        topk = None
        if self.topk:
            topk = TopkLogprobs(
                np.concatenate([piece.token_ids for piece in self.topk]),
                np.concatenate([piece.logprobs for piece in self.topk]),
            )
        return SampledSequence(
            self.stop_reason,
            sequence_id,
            _joined(self.tokens, np.int32),
            _joined(self.logprobs, np.float32),
            topk,
        )


class Samples:
    """Collects the messages of one stream.

    Args:
        num_samples: How many sequences it has.
        targets: The request's `target_prompt_logprobs`, whose layout the answer has.
    """

    def __init__(self, num_samples: int, targets: TensorData | None = None) -> None:
        self._targets = targets
        self._pieces = [_Pieces() for _ in range(num_samples)]
        self._scores: pb.PromptLogprobs | None = None
        self._cache_hit_tokens = 0

    def add(self, response: pb.SampleResponse) -> None:
        """Take the next piece in."""
        if response.HasField("prompt_logprobs"):
            self._scores = response.prompt_logprobs
        self._cache_hit_tokens += response.prompt_cache_hit_tokens
        for delta in response.deltas:
            self._pieces[delta.sequence_index].add(delta)

    def result(self) -> SampleResponse:
        """The whole answer."""
        call_id = secrets.token_hex(8)
        sequences = [
            pieces.sequence(f"{call_id}:{index}") for index, pieces in enumerate(self._pieces)
        ]
        scores = pb.PromptLogprobs() if self._scores is None else self._scores
        logprobs = topk = targets = alternatives = None
        if scores.HasField("logprobs"):
            logprobs = tensors.decode(scores.logprobs)
        if scores.HasField("topk_token_ids"):
            topk = _topk(scores.topk_token_ids, scores.topk_logprobs)
        if scores.HasField("target_logprobs"):
            targets = in_layout_of(self._targets, tensors.decode(scores.target_logprobs))
        if scores.HasField("alt_token_ids"):
            tokens = tensors.decode(scores.alt_token_ids).astype(np.int64)
            alternatives = PromptAltTokens(tokens, tensors.decode(scores.alt_logprobs))
        return SampleResponse(
            sequences, logprobs, topk, targets, self._cache_hit_tokens, alternatives
        )


def _topk(token_ids: types_pb2.Tensor, logprobs: types_pb2.Tensor) -> TopkLogprobs:
    """A table of the most likely tokens; what is NaN on the wire is an empty cell."""
    values = tensors.decode(logprobs)
    values = np.where(np.isnan(values), np.float32(EMPTY_LOGPROB), values)
    return TopkLogprobs(tensors.decode(token_ids).astype(np.int32), values)


def _joined(pieces: Sequence[NDArray[Any]], dtype: type[Any]) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *pieces]).astype(dtype)


class Given:
    """What was given out of one sequence, over all attempts of its stream."""

    def __init__(self) -> None:
        self.seen = 0  # tokens of the present attempt
        self._tokens: list[int] = []
        self._ended = False

    def take(self, part: SampledTokens) -> SampledTokens | None:
        """The part without what was given out before; None when nothing is left.

        Raises:
            DataLossError: It has other tokens than those that were given out.
        """
        start, self.seen = self.seen, self.seen + len(part.tokens)
        known = self._tokens[start : self.seen]
        if part.tokens[: len(known)] != known:
            raise DataLossError(
                "the stream broke, and begun again it made other tokens", reason="SAMPLE_DIFFERS"
            )
        tokens, logprobs = part.tokens[len(known) :], part.logprobs[len(known) :]
        self._tokens.extend(tokens)
        ends = part.stop_reason is not None and not self._ended
        self._ended = self._ended or ends
        return replace(part, tokens=tokens, logprobs=logprobs) if tokens or ends else None
