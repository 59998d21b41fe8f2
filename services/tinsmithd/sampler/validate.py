"""Checks a request against the base model and the limits, before anything is computed."""

import math
import secrets
from dataclasses import dataclass, fields, replace

import numpy as np

from tinsmithd.domain import RANGE, BaseModelInfo, Range, SampleRequest, SamplingParams
from tinsmithd.errors import InvalidArgument, Reason, over_limit


@dataclass(frozen=True)
class RequestLimits:
    """Bounds on one request; the names are those of the settings."""

    num_samples_max: int
    stop_characters_max: int
    topk_max: int
    sample_tokens_max: int


def check_request(
    request: SampleRequest, info: BaseModelInfo, limits: RequestLimits
) -> SampleRequest:
    """Refuse what cannot be sampled; fill in the length and the seed where they are unset.

    A negative `max_tokens` stands for unset. With 0 the prompt is only scored.

    Raises:
        InvalidArgument: Naming the field.
    """
    _check_prompt(request.prompt, info)
    _check_range("num_samples", request.num_samples, 1, limits.num_samples_max, "num_samples_max")
    topk_max = min(limits.topk_max, info.vocab_size)
    topk = request.topk_prompt_logprobs
    _check_range("topk_prompt_logprobs", topk, 0, topk_max, "topk_max")
    _check_params(request.params, info, limits)
    room = info.context_length - len(request.prompt)
    max_tokens = request.params.max_tokens
    if max_tokens != 0:
        if room < 1:
            message = f"{len(request.prompt)} tokens leave no room in {info.context_length}"
            raise _too_long("prompt", message, len(request.prompt))
        if max_tokens > room:
            message = f"{max_tokens} tokens do not fit: the prompt leaves room for {room}"
            raise _too_long("sampling_params.max_tokens", message, max_tokens)
    length = len(request.prompt) + (room if max_tokens < 0 else max_tokens)
    if request.num_samples * length > limits.sample_tokens_max:
        most = limits.sample_tokens_max
        raise InvalidArgument(
            "num_samples",
            f"{request.num_samples} samples of up to {length} tokens are more than "
            f"sample_tokens_max = {most}; set a smaller max_tokens",
            Reason.LIMIT_EXCEEDED,
            metadata={
                "limit": "sample_tokens_max",
                "value": str(request.num_samples * length),
            },
        )
    seed = request.params.seed
    params = replace(
        request.params,
        max_tokens=room if max_tokens < 0 else max_tokens,
        seed=secrets.randbits(63) if seed is None else seed,
    )
    return replace(request, params=params)


def _check_prompt(prompt: np.ndarray, info: BaseModelInfo) -> None:
    if len(prompt) > info.context_length:
        message = f"{len(prompt)} tokens, context_length is {info.context_length}"
        raise _too_long("prompt", message, len(prompt))
    outside = (prompt < 0) | (prompt >= info.vocab_size)
    if outside.any():
        at = int(np.argmax(outside))
        raise InvalidArgument(
            "prompt",
            f"token {prompt[at]} at [{at}] is not in [0, {info.vocab_size})",
            Reason.TOKEN_OUT_OF_RANGE,
        )


def _check_params(params: SamplingParams, info: BaseModelInfo, limits: RequestLimits) -> None:
    field = "sampling_params"
    for about in fields(params):
        allowed: Range | None = about.metadata.get(RANGE)
        if allowed is None:
            continue
        value = getattr(params, about.name)
        if not math.isfinite(value):
            raise InvalidArgument(f"{field}.{about.name}", "is not finite", Reason.NON_FINITE)
        if problem := allowed.problem(value):
            raise InvalidArgument(f"{field}.{about.name}", problem)
    for index, token in enumerate(params.stop_tokens):
        if not 0 <= token < info.vocab_size:
            message = f"token {token} is not in [0, {info.vocab_size})"
            where = f"{field}.stop.tokens[{index}]"
            raise InvalidArgument(where, message, Reason.TOKEN_OUT_OF_RANGE)
    for index, string in enumerate(params.stop_strings):
        where = f"{field}.stop.strings[{index}]"
        if not string:
            raise InvalidArgument(where, "is empty")
        if len(string) > limits.stop_characters_max:
            most = limits.stop_characters_max
            raise over_limit(where, "stop_characters_max", len(string), most)


def _check_range(field: str, value: int, low: int, high: int, limit: str) -> None:
    if value > high:
        raise over_limit(field, limit, value, high)
    if value < low:
        raise InvalidArgument(field, f"{value} is not in {low}..{high}")


def _too_long(field: str, message: str, value: int) -> InvalidArgument:
    metadata = {"limit": "context_length", "value": str(value)}
    return InvalidArgument(field, message, Reason.LIMIT_EXCEEDED, metadata=metadata)
