"""Messages of `sampler_service.proto` to domain values and back."""

import math
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinsmith.v1 import sampler_service_pb2 as pb
from tinsmithd.convert.tensors import array_from_pb, check_format, write_array
from tinsmithd.convert.types import check_count, tokens_from_pb
from tinsmithd.domain import (
    RANGE,
    AltTokens,
    Output,
    PromptScores,
    SampledTokens,
    SampleRequest,
    SamplingParams,
    StopReason,
    TopKLogprobs,
)
from tinsmithd.errors import InvalidArgument

_STOP_REASONS = {
    None: pb.STOP_REASON_UNSPECIFIED,
    StopReason.STOP: pb.STOP_REASON_STOP,
    StopReason.LENGTH: pb.STOP_REASON_LENGTH,
}
UNSET_MAX_TOKENS = -1
GATHER_KEY = "tinsmith-gather-s"
GATHER_S_MAX = 60.0
INLINE_NUMBERS = 16_384
"""Writing so many as plain numbers takes a millisecond."""
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
        prompt_logprobs_last_n=_last_n(message),
        target_prompt_logprobs=_targets(message),
        prompt_alt_tokens_k=message.prompt_alt_tokens_k,
        topk_sample_logprobs=message.topk_sample_logprobs,
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
        prompt_logprobs_last_n=_last_n(message),
    )


def gather_s_from_metadata(metadata: Iterable[tuple[str, str | bytes]] | None) -> float | None:
    """How long the caller of `Sample` lets tokens wait for the next message; None: it says nothing.

    Raises:
        InvalidArgument: It says what is no such time.
    """
    said = dict(metadata or ()).get(GATHER_KEY)
    if said is None:
        return None
    try:
        seconds = float(said)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= GATHER_S_MAX:
        text = f"is no number of seconds from 0 to {GATHER_S_MAX:g}"
        raise InvalidArgument(f"metadata[{GATHER_KEY!r}]", text)
    return seconds


def _last_n(message: pb.SampleRequest | pb.ComputeLogprobsRequest) -> int | None:
    asked = message.HasField("prompt_logprobs_last_n")
    return message.prompt_logprobs_last_n if asked else None


def _targets(message: pb.SampleRequest) -> NDArray[np.int64] | None:
    if not message.HasField("target_prompt_logprobs"):
        return None
    return array_from_pb(message.target_prompt_logprobs, "target_prompt_logprobs", "int")


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


def output_to_pb(output: Output, tensor_format: int) -> pb.SampleResponse:
    """Write some of what a request made."""
    message = pb.SampleResponse(prompt_cache_hit_tokens=output.prompt_cache_hit_tokens)
    for tokens in output.tokens:
        _write_delta(message.deltas.add(), tokens, tensor_format)
    if output.prompt_scores is not None:
        _write_scores(message.prompt_logprobs, output.prompt_scores, tensor_format)
    return message


def is_long(output: Output) -> bool:
    """Whether writing it takes so long that nothing else should wait for it."""
    if output.prompt_scores is not None:
        return True
    numbers = sum(2 * len(made.tokens) + _size(made.topk) for made in output.tokens)
    return numbers > INLINE_NUMBERS


def _size(topk: TopKLogprobs | None) -> int:
    return 0 if topk is None else 2 * topk.logprobs.size


def _write_scores(message: pb.PromptLogprobs, scores: PromptScores, tensor_format: int) -> None:
    message.SetInParent()
    for tensor, array in (("logprobs", scores.logprobs), ("target_logprobs", scores.targets)):
        if array is not None:
            write_array(getattr(message, tensor), array, tensor_format)
    for prefix, table in (("topk", scores.topk), ("alt", scores.alt_tokens)):
        if table is not None:
            _write_table(message, prefix, table, tensor_format)


def _write_delta(message: pb.SequenceDelta, made: SampledTokens, tensor_format: int) -> None:
    message.sequence_index = made.sequence_index
    message.stop_reason = _STOP_REASONS[made.stop_reason]
    write_array(message.tokens, np.array(made.tokens, np.int64), tensor_format)
    write_array(message.logprobs, np.array(made.logprobs, np.float32), tensor_format)
    if made.topk is not None:
        _write_table(message, "topk", made.topk, tensor_format)


def _write_table(
    message: pb.PromptLogprobs | pb.SequenceDelta,
    prefix: str,
    table: TopKLogprobs | AltTokens,
    tensor_format: int,
) -> None:
    # Half the bytes: a vocabulary has fewer than 2^31 tokens, and such tables are large.
    ids = table.token_ids.astype(np.int32)
    write_array(getattr(message, f"{prefix}_token_ids"), ids, tensor_format)
    write_array(getattr(message, f"{prefix}_logprobs"), table.logprobs, tensor_format)
