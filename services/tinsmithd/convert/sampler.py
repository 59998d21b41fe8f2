"""Messages of `sampler_service.proto` to domain values and back."""

from dataclasses import fields
from typing import Any

import numpy as np

from tinsmith.v1 import sampler_service_pb2 as pb
from tinsmithd.convert.tensors import array_to_pb, check_format
from tinsmithd.convert.types import check_count, tokens_from_pb
from tinsmithd.domain import (
    RANGE,
    PromptScores,
    SampledTokens,
    SampleRequest,
    SamplingParams,
    StopReason,
)
from tinsmithd.errors import InvalidArgument

_STOP_REASONS = {
    None: pb.STOP_REASON_UNSPECIFIED,
    StopReason.STOP: pb.STOP_REASON_STOP,
    StopReason.LENGTH: pb.STOP_REASON_LENGTH,
}
UNSET_MAX_TOKENS = -1
_RANGED: Any = [field.name for field in fields(SamplingParams) if RANGE in field.metadata]


def sample_request_from_pb(
    message: pb.SampleRequest, *, chunks_max: int, stops_max: int
) -> SampleRequest:
    """Read a request; `max_tokens` below 0 means that it was unset."""
    check_format(message.tensor_format, "tensor_format")
    return SampleRequest(
        prompt=tokens_from_pb(message.prompt, "prompt", chunks_max),
        num_samples=message.num_samples if message.HasField("num_samples") else 1,
        params=_params_from_pb(message.sampling_params, stops_max),
        include_prompt_logprobs=message.include_prompt_logprobs,
        topk_prompt_logprobs=message.topk_prompt_logprobs,
    )


def compute_request_from_pb(
    message: pb.ComputeLogprobsRequest, *, chunks_max: int
) -> SampleRequest:
    """Read a request that only scores its prompt."""
    check_format(message.tensor_format, "tensor_format")
    return SampleRequest(
        prompt=tokens_from_pb(message.prompt, "prompt", chunks_max),
        num_samples=1,
        params=SamplingParams(max_tokens=0),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=message.topk_prompt_logprobs,
    )


def _params_from_pb(message: pb.SamplingParams, stops_max: int) -> SamplingParams:
    max_tokens = UNSET_MAX_TOKENS
    if message.HasField("max_tokens"):
        max_tokens = message.max_tokens
        if max_tokens < 1:  # here, since below 0 means unset and 0 means only to score
            raise InvalidArgument("sampling_params.max_tokens", f"{max_tokens} is below 1")
    stop = message.stop if message.HasField("stop") else pb.StopCondition(eos=True)
    check_count("sampling_params.stop.tokens", stop.tokens, "stops_max", stops_max)
    check_count("sampling_params.stop.strings", stop.strings, "stops_max", stops_max)
    return SamplingParams(
        max_tokens=max_tokens,
        **{name: getattr(message, name) for name in _RANGED if message.HasField(name)},
        seed=message.seed if message.HasField("seed") else None,
        stop_tokens=tuple(stop.tokens),
        stop_strings=tuple(stop.strings),
        stop_at_eos=stop.eos,
    )


def scores_to_pb(scores: PromptScores, tensor_format: int) -> pb.PromptLogprobs:
    """Write a prompt's scores."""
    message = pb.PromptLogprobs()
    if scores.logprobs is not None:
        message.logprobs.CopyFrom(array_to_pb(scores.logprobs, tensor_format))
    if scores.topk is not None:
        message.topk_token_ids.CopyFrom(array_to_pb(scores.topk.token_ids, tensor_format))
        message.topk_logprobs.CopyFrom(array_to_pb(scores.topk.logprobs, tensor_format))
    return message


def delta_to_pb(tokens: SampledTokens, tensor_format: int) -> pb.SequenceDelta:
    """Write new tokens of one sequence."""
    return pb.SequenceDelta(
        sequence_index=tokens.sequence_index,
        tokens=array_to_pb(np.array(tokens.tokens, np.int64), tensor_format),
        logprobs=array_to_pb(np.array(tokens.logprobs, np.float32), tensor_format),
        stop_reason=_STOP_REASONS[tokens.stop_reason],
    )
