"""Puts a Sampler's stream together as the answer that the SDK reads, as protobuf or as JSON."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinsmith import tensors
from tinsmith.gateway.v1 import tinker_pb2
from tinsmith.v1 import sampler_service_pb2 as pb
from tinsmith.v1 import types_pb2
from tinsmithd.gateway.tinker.samples.requests import SparseLayout, cells

EMPTY_LOGPROB = -99999.0
"""With token 0, what an empty cell of a table holds in the SDK."""
STOP, LENGTH = 0, 1


class Answer:
    """Collects the messages of one stream.

    Args:
        num_samples: How many sequences it has.
        layout: How the targets came, where they were sparse.
    """

    def __init__(self, num_samples: int, layout: SparseLayout | None = None) -> None:
        self._deltas: list[list[pb.SequenceDelta]] = [[] for _ in range(num_samples)]
        self._layout = layout
        self._scores = pb.PromptLogprobs()
        self._cache_hit_tokens = 0

    def add(self, response: pb.SampleResponse) -> None:
        """Take the next piece in."""
        if response.HasField("prompt_logprobs"):
            self._scores = response.prompt_logprobs
        self._cache_hit_tokens += response.prompt_cache_hit_tokens
        for delta in response.deltas:
            self._deltas[delta.sequence_index].append(delta)

    def message(self) -> tinker_pb2.SampleResponse:
        """The whole answer."""
        made = tinker_pb2.SampleResponse(prompt_cache_hit_tokens=self._cache_hit_tokens)
        for deltas in self._deltas:
            _write_sequence(made.sequences.add(), deltas)
        scores = self._scores
        if scores.HasField("logprobs"):
            made.prompt_logprobs = tensors.decode(scores.logprobs).astype("<f4").tobytes()
        if scores.HasField("topk_token_ids"):
            table = (scores.topk_token_ids, scores.topk_logprobs)
            _write_topk(made.topk_prompt_logprobs, [table])
        if scores.HasField("target_logprobs"):
            values = tensors.decode(scores.target_logprobs)
            _write_targets(made.target_prompt_logprobs, values, self._layout)
        if scores.HasField("alt_token_ids"):
            # As int64: the SDK shows integers as such, and does not widen these.
            tokens = tensors.decode(scores.alt_token_ids).astype("<i8")
            _write_dense(made.prompt_alt_tokens.tokens, tokens, tinker_pb2.D_TYPE_INT64)
            logprobs = tensors.decode(scores.alt_logprobs).astype("<f4")
            _write_dense(made.prompt_alt_tokens.logprobs, logprobs, tinker_pb2.D_TYPE_FLOAT32)
        return made


def _write_sequence(
    sequence: tinker_pb2.SampledSequence, deltas: Sequence[pb.SequenceDelta]
) -> None:
    tokens = [tensors.decode(delta.tokens) for delta in deltas]
    logprobs = [tensors.decode(delta.logprobs) for delta in deltas]
    sequence.tokens = _joined(tokens, "<i4").tobytes()
    sequence.logprobs = _joined(logprobs, "<f4").tobytes()
    ends = [delta.stop_reason for delta in deltas if delta.stop_reason]
    sequence.stop_reason = STOP if ends == [pb.STOP_REASON_STOP] else LENGTH
    tables = [
        (delta.topk_token_ids, delta.topk_logprobs)
        for delta in deltas
        if delta.HasField("topk_token_ids")
    ]
    if tables:
        _write_topk(sequence.topk_sampled_logprobs, tables)


def _joined(pieces: Sequence[NDArray[Any]], dtype: str) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *pieces]).astype(dtype)


def _write_topk(
    topk: tinker_pb2.TopkLogprobs, tables: Sequence[tuple[types_pb2.Tensor, types_pb2.Tensor]]
) -> None:
    ids = np.concatenate([tensors.decode(each) for each, _ in tables]).astype("<i4")
    values = np.concatenate([tensors.decode(each) for _, each in tables]).astype("<f4")
    empty = np.isnan(values)
    topk.length, topk.k = values.shape
    topk.token_ids = np.where(empty, np.int32(0), ids).astype("<i4").tobytes()
    topk.logprobs = np.where(empty, np.float32(EMPTY_LOGPROB), values).astype("<f4").tobytes()


def _write_dense(tensor: tinker_pb2.Tensor, values: NDArray[Any], dtype: int) -> None:
    tensor.dense = values.tobytes()
    tensor.dtype = dtype  # type: ignore[assignment]
    tensor.shape.extend(values.shape)


def _write_targets(
    tensor: tinker_pb2.Tensor, values: NDArray[Any], layout: SparseLayout | None
) -> None:
    if layout is None:
        _write_dense(tensor, values.astype("<f4"), tinker_pb2.D_TYPE_FLOAT32)
        return
    tensor.sparse_csr.values = values[cells(layout.crow)].astype("<f4").tobytes()
    tensor.sparse_csr.crow_indices = layout.crow.astype("<i8").tobytes()
    tensor.sparse_csr.col_indices = layout.col.astype("<i8").tobytes()
    tensor.dtype = tinker_pb2.D_TYPE_FLOAT32
    tensor.shape.extend((len(layout.crow) - 1, layout.columns))


def as_json(answer: tinker_pb2.SampleResponse) -> Mapping[str, Any]:
    """The answer for an SDK that reads JSON: those of that age ask for no more than it has."""
    found: dict[str, Any] = {
        "type": "sample",
        "sequences": [_sequence_as_json(each) for each in answer.sequences],
        "prompt_cache_hit_tokens": answer.prompt_cache_hit_tokens,
    }
    if answer.HasField("prompt_logprobs"):
        found["prompt_logprobs"] = _numbers(np.frombuffer(answer.prompt_logprobs, "<f4"))
    if answer.HasField("topk_prompt_logprobs"):
        found["topk_prompt_logprobs"] = _topk_as_json(answer.topk_prompt_logprobs)
    return found


def _sequence_as_json(sequence: tinker_pb2.SampledSequence) -> Mapping[str, Any]:
    return {
        "stop_reason": "stop" if sequence.stop_reason == STOP else "length",
        "tokens": np.frombuffer(sequence.tokens, "<i4").tolist(),
        "logprobs": _numbers(np.frombuffer(sequence.logprobs, "<f4")),
    }


def _numbers(values: NDArray[Any]) -> list[float | None]:
    return [each if math.isfinite(each) else None for each in values.tolist()]


def _topk_as_json(topk: tinker_pb2.TopkLogprobs) -> list[list[tuple[int, float]] | None]:
    ids = np.frombuffer(topk.token_ids, "<i4").reshape(topk.length, topk.k).tolist()
    values = np.frombuffer(topk.logprobs, "<f4").reshape(topk.length, topk.k).tolist()
    rows = [
        [cell for cell in zip(*row, strict=True) if cell != (0, EMPTY_LOGPROB)]
        for row in zip(ids, values, strict=True)
    ]
    return [row or None for row in rows]
