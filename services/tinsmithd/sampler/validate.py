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
    alternatives_max: int


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
    _check_last_n(request)
    _check_params(request.params, info, limits)
    max_tokens = _length(request, info)
    length = len(request.prompt) + max_tokens
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
                "allowed": str(most),
            },
        )
    _check_alternatives(request, max_tokens, info, limits)
    seed = request.params.seed
    params = replace(
        request.params,
        max_tokens=max_tokens,
        seed=secrets.randbits(63) if seed is None else seed,
    )
    return replace(request, params=params)


def _length(request: SampleRequest, info: BaseModelInfo) -> int:
    """How many tokens a sequence may have; with the prompt they must fit into the context."""
    asked, prompt, context = request.params.max_tokens, len(request.prompt), info.context_length
    if asked == 0:
        return 0
    total = prompt + max(asked, 1)
    if total > context:
        field = "sampling_params.max_tokens" if prompt < context else "prompt"
        text = f"prompt of {prompt} and max_tokens of {max(asked, 1)} are {total} tokens"
        raise _too_long(field, f"{text}, context_length is {context}", total, context)
    return context - prompt if asked < 0 else asked


def _check_prompt(prompt: np.ndarray, info: BaseModelInfo) -> None:
    if len(prompt) > info.context_length:
        message = f"{len(prompt)} tokens, context_length is {info.context_length}"
        raise _too_long("prompt", message, len(prompt), info.context_length)
    _check_tokens("prompt", prompt, 0, info)


def _check_tokens(field: str, tokens: np.ndarray, low: int, info: BaseModelInfo) -> None:
    outside = (tokens < low) | (tokens >= info.vocab_size)
    if outside.any():
        at = np.unravel_index(np.argmax(outside), outside.shape)
        place = ", ".join(str(int(index)) for index in at)
        raise InvalidArgument(
            field,
            f"token {tokens[at]} at [{place}] is not in [{low}, {info.vocab_size})",
            Reason.TOKEN_OUT_OF_RANGE,
        )


def _check_last_n(request: SampleRequest) -> None:
    last_n = request.prompt_logprobs_last_n
    if last_n is None:
        return
    field, most = "prompt_logprobs_last_n", len(request.prompt) - 1
    if not request.include_prompt_logprobs:
        text = f"needed by {field}"
        raise InvalidArgument("include_prompt_logprobs", text, Reason.MISSING_FIELD)
    if not 1 <= last_n <= most:
        text = f"{last_n} is not in 1..{most}, the prompt has {most + 1} tokens"
        raise InvalidArgument(field, text)


def _check_alternatives(
    request: SampleRequest, max_tokens: int, info: BaseModelInfo, limits: RequestLimits
) -> None:
    """Refuse too many alternatives: at a position, or in all."""
    topk_max = min(limits.topk_max, info.vocab_size)
    length, made = len(request.prompt), request.num_samples * max_tokens
    targets, total = request.target_prompt_logprobs, 0
    if targets is not None:
        _check_targets(targets, length, info)
    for field, each, positions, most in (
        ("topk_prompt_logprobs", request.topk_prompt_logprobs, length, topk_max),
        ("prompt_alt_tokens_k", request.prompt_alt_tokens_k, length, limits.topk_max),
        ("topk_sample_logprobs", request.topk_sample_logprobs, made, topk_max),
        ("target_prompt_logprobs", 0 if targets is None else targets.shape[1], length, None),
    ):
        if most is not None:
            _check_range(field, each, 0, most, "topk_max")
        total += each * positions
        if total > limits.alternatives_max:
            raise over_limit(field, "alternatives_max", total, limits.alternatives_max)


def _check_targets(targets: np.ndarray, length: int, info: BaseModelInfo) -> None:
    field = "target_prompt_logprobs"
    if targets.ndim != 2 or len(targets) != length - 1 or not targets.shape[1]:
        text = f"shape {list(targets.shape)}, expected [{length - 1}, K] with K at least 1"
        raise InvalidArgument(field, text, Reason.INVALID_SHAPE)
    _check_tokens(field, targets, -1, info)


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


def _too_long(field: str, message: str, value: int, allowed: int) -> InvalidArgument:
    metadata = {"limit": "context_length", "value": str(value), "allowed": str(allowed)}
    return InvalidArgument(field, message, Reason.LIMIT_EXCEEDED, metadata=metadata)
