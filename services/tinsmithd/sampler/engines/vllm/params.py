"""A request as vLLM is asked for it."""

import hashlib
from typing import Any

from vllm.sampling_params import RequestOutputKind, SamplingParams

from tinsmithd.domain import Range, SampleRequest
from tinsmithd.errors import InvalidArgument

TEMPERATURES = Range(0.01, 2.0)
"""Those above 0 that vLLM draws at: it takes a smaller one for the smallest, and refuses others."""


def check_request(request: SampleRequest) -> None:
    """Refuse what vLLM would answer otherwise than it is asked, or not at all.

    Raises:
        InvalidArgument: Naming the field.
    """
    temperature = request.params.temperature
    if temperature and (problem := TEMPERATURES.problem(temperature)):
        message = f"{problem}; engine vllm draws at no other but 0"
        raise InvalidArgument("sampling_params.temperature", message)
    for field, asked in (
        ("target_prompt_logprobs", request.target_prompt_logprobs is not None),
        ("prompt_alt_tokens_k", request.prompt_alt_tokens_k > 0),
    ):
        if asked:
            raise InvalidArgument(field, "engine vllm does not compute this")


def sequence_seed(seed: int, index: int) -> int:
    """The seed of one sequence, in [0, 2**63): other ones for each seed and index.

    vLLM's own for several samples are `seed + index`, so that requests with seeds in a row would
    draw the same.
    """
    text = f"{seed % (1 << 64)}.{index}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def scoring_params(request: SampleRequest) -> SamplingParams:
    """Score a prompt; vLLM makes at least one token, which nobody reads."""
    return SamplingParams(
        max_tokens=1,
        temperature=0,
        prompt_logprobs=request.topk_prompt_logprobs,
        output_kind=RequestOutputKind.FINAL_ONLY,
        **_PLAIN,
    )


def sequence_params(request: SampleRequest, index: int, eos_ids: frozenset[int]) -> SamplingParams:
    """Sample one sequence; stop strings are looked for elsewhere."""
    params = request.params
    assert params.seed is not None  # the servicer draws one
    stops = {*params.stop_tokens, *(eos_ids if params.stop_at_eos else ())}
    return SamplingParams(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_k=max(params.top_k, 0),
        top_p=params.top_p,
        seed=sequence_seed(params.seed, index),
        stop_token_ids=sorted(stops),
        logprobs=request.topk_sample_logprobs,
        output_kind=RequestOutputKind.DELTA,
        **_PLAIN,
    )


_PLAIN: dict[str, Any] = {
    "detokenize": False,
    "ignore_eos": True,  # what is to end a sequence is said in full
    "flat_logprobs": True,
    "skip_clone": True,
}
