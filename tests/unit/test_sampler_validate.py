"""What the Sampler refuses before it computes anything, and what it fills in."""

import numpy as np
import pytest

from tinsmithd.domain import BaseModelInfo, SampleRequest, SamplingParams
from tinsmithd.errors import InvalidArgument, Reason
from tinsmithd.sampler.validate import RequestLimits, check_request

INFO = BaseModelInfo("tiny", "LlamaForCausalLM", 300, 1000, "float32", 2, 1)
LIMITS = RequestLimits(
    num_samples_max=64, stop_characters_max=4, topk_max=8, sample_tokens_max=4000
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
    with pytest.raises(InvalidArgument, match="leave no room"):
        check_request(SampleRequest(full.prompt, 1, SamplingParams(max_tokens=1)), INFO, LIMITS)
