"""What the Sampler refuses before it computes anything, and what it fills in."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tinsmithd.domain import BaseModelInfo, SampleRequest, SamplingParams
from tinsmithd.errors import InvalidArgument, Reason
from tinsmithd.sampler.validate import RequestLimits, check_request

INFO = BaseModelInfo("tiny", "LlamaForCausalLM", 300, 1000, "float32", 2, 1)
LIMITS = RequestLimits(
    num_samples_max=64,
    stop_characters_max=4,
    topk_max=8,
    sample_tokens_max=4000,
    alternatives_max=1000,
)


def request(num_samples: int, max_tokens: int) -> SampleRequest:
    return SampleRequest(np.arange(100), num_samples, SamplingParams(max_tokens))


def test_unset_length_is_the_room_that_is_left_and_unset_seed_is_drawn() -> None:
    """Two requests without a seed differ in theirs."""
    first, second = (check_request(request(2, -1), INFO, LIMITS).params for _ in range(2))
    assert first.max_tokens == 900
    assert first.seed != second.seed


def test_tokens_of_a_call_are_bounded_in_all() -> None:
    """Samples times prompt and new tokens, whether the length was set or not."""
    assert check_request(request(20, 100), INFO, LIMITS).num_samples == 20
    for num_samples, max_tokens in ((21, 100), (5, -1)):
        with pytest.raises(InvalidArgument, match="sample_tokens_max = 4000") as refusal:
            check_request(request(num_samples, max_tokens), INFO, LIMITS)
        assert (refusal.value.reason, refusal.value.field) == (
            Reason.LIMIT_EXCEEDED,
            "num_samples",
        )


def test_a_prompt_that_fills_the_context_can_be_scored_but_not_sampled() -> None:
    """`max_tokens` 0 only scores."""
    full = SampleRequest(np.zeros(1000, np.int64), 1, SamplingParams(max_tokens=0))
    assert check_request(full, INFO, LIMITS).params.max_tokens == 0
    with pytest.raises(InvalidArgument, match="1001 tokens, context_length is 1000"):
        check_request(SampleRequest(full.prompt, 1, SamplingParams(max_tokens=1)), INFO, LIMITS)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "field", "value"),
    [
        (100, 901, "sampling_params.max_tokens", 1001),
        (1000, 5, "prompt", 1005),
        (1000, -1, "prompt", 1001),
        (1001, 0, "prompt", 1001),
    ],
)
def test_what_does_not_fit_into_the_context_is_said_with_both_numbers(
    prompt: int, max_tokens: int, field: str, value: int
) -> None:
    """In the message and for programs; one token less is taken."""
    asked = SampleRequest(np.zeros(prompt, np.int64), 1, SamplingParams(max_tokens))
    with pytest.raises(InvalidArgument, match=f"{value} tokens, context_length is 1000") as refusal:
        check_request(asked, INFO, LIMITS)
    assert refusal.value.field == field
    assert refusal.value.metadata == {
        "limit": "context_length",
        "value": str(value),
        "allowed": "1000",
    }
    shorter = replace(asked, prompt=asked.prompt[: prompt - (field == "prompt") * (value - 1000)])
    fewer = SamplingParams(900) if max_tokens > 5 else asked.params
    assert check_request(replace(shorter, params=fewer), INFO, LIMITS)


# --- what is asked beside tokens ------------------------------------------------------------------

TARGETS = np.full((99, 2), 7)


def scoring(**asked: Any) -> SampleRequest:
    return replace(request(1, 10), **asked)


def changed(at: tuple[int, int], token: int) -> np.ndarray:
    targets = TARGETS.copy()
    targets[at] = token
    return targets


@pytest.mark.parametrize(
    ("asked", "field", "reason"),
    [
        ({"topk_prompt_logprobs": 9}, "topk_prompt_logprobs", Reason.LIMIT_EXCEEDED),
        ({"topk_prompt_logprobs": -1}, "topk_prompt_logprobs", Reason.INVALID_FIELD),
        ({"topk_sample_logprobs": 9}, "topk_sample_logprobs", Reason.LIMIT_EXCEEDED),
        ({"topk_sample_logprobs": -1}, "topk_sample_logprobs", Reason.INVALID_FIELD),
        ({"prompt_alt_tokens_k": 9}, "prompt_alt_tokens_k", Reason.LIMIT_EXCEEDED),
        ({"prompt_alt_tokens_k": -1}, "prompt_alt_tokens_k", Reason.INVALID_FIELD),
        ({"prompt_logprobs_last_n": 1}, "include_prompt_logprobs", Reason.MISSING_FIELD),
        *(
            (
                {"prompt_logprobs_last_n": last_n, "include_prompt_logprobs": True},
                "prompt_logprobs_last_n",
                Reason.INVALID_FIELD,
            )
            for last_n in (0, -1, 100, 2**31 - 1)
        ),
        *(
            (
                {"target_prompt_logprobs": np.zeros(shape, np.int64)},
                "target_prompt_logprobs",
                Reason.INVALID_SHAPE,
            )
            for shape in ((100, 2), (98, 2), (99,), (99, 0), (0, 2), (2, 99))
        ),
        *(
            (
                {"target_prompt_logprobs": changed((98, 1), token)},
                "target_prompt_logprobs",
                Reason.TOKEN_OUT_OF_RANGE,
            )
            for token in (-2, 300, 2**62, -(2**63))
        ),
        (
            {"target_prompt_logprobs": np.zeros((99, 11), np.int64)},
            "target_prompt_logprobs",
            Reason.LIMIT_EXCEEDED,
        ),
        # Each of them is allowed alone.
        (
            {"topk_prompt_logprobs": 5, "prompt_alt_tokens_k": 6},
            "prompt_alt_tokens_k",
            Reason.LIMIT_EXCEEDED,
        ),
        (
            {"prompt_alt_tokens_k": 8, "num_samples": 5, "topk_sample_logprobs": 5},
            "topk_sample_logprobs",
            Reason.LIMIT_EXCEEDED,
        ),
    ],
)
def test_what_cannot_be_scored_is_refused_by_its_name(
    asked: dict[str, Any], field: str, reason: Reason
) -> None:
    """Before anything is made of it."""
    with pytest.raises(InvalidArgument) as refusal:
        check_request(scoring(**asked), INFO, LIMITS)
    assert (refusal.value.field, refusal.value.reason) == (field, reason)


def test_what_is_asked_up_to_its_bounds_is_taken() -> None:
    """-1 in targets is no token, and a prompt of one has no position to score."""
    most = {"include_prompt_logprobs": True, "prompt_logprobs_last_n": 99}
    for asked in (
        {"topk_prompt_logprobs": 8, "target_prompt_logprobs": changed((0, 0), -1), **most},
        {"topk_sample_logprobs": 8, "prompt_alt_tokens_k": 8, **most, "prompt_logprobs_last_n": 1},
        {"prompt": np.zeros(1, np.int64), "target_prompt_logprobs": np.zeros((0, 3), np.int64)},
    ):
        assert check_request(scoring(**asked), INFO, LIMITS).num_samples == 1


def test_a_vocabulary_bounds_the_likeliest_tokens_but_not_the_drawn_ones() -> None:
    """What is drawn may come twice."""
    few = replace(INFO, vocab_size=5)
    prompt = np.zeros(10, np.int64)
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs"):
        assert check_request(scoring(prompt=prompt, **{name: 5}), few, LIMITS)
        with pytest.raises(InvalidArgument, match="allows: 5"):
            check_request(scoring(prompt=prompt, **{name: 6}), few, LIMITS)
    assert check_request(scoring(prompt=prompt, prompt_alt_tokens_k=8), few, LIMITS)


@pytest.mark.parametrize(
    ("asked", "first"),
    [
        ({}, 99),
        ({"topk_sample_logprobs": 3}, 99),
        ({"include_prompt_logprobs": True}, 0),
        ({"topk_prompt_logprobs": 1}, 0),
        ({"include_prompt_logprobs": True, "prompt_logprobs_last_n": 1}, 98),
        ({"include_prompt_logprobs": True, "prompt_logprobs_last_n": 99}, 0),
        (
            {
                "include_prompt_logprobs": True,
                "prompt_logprobs_last_n": 1,
                "prompt_alt_tokens_k": 1,
            },
            0,
        ),
        ({"target_prompt_logprobs": TARGETS}, 0),
    ],
)
def test_a_request_says_from_where_on_logits_are_needed(asked: dict[str, Any], first: int) -> None:
    """What comes before need not be made, nor kept."""
    assert scoring(**asked).logits_from == first
