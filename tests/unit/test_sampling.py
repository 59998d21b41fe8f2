"""Drawing tokens and ending sequences."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tinsmithd.domain import SamplingParams, StopReason
from tinsmithd.sampler.engines.transformers.sampling import Draws, draw
from tinsmithd.sampler.engines.transformers.stopping import StopCheck

LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.5, 2.5])


def params(**kwargs: object) -> SamplingParams:
    return SamplingParams(max_tokens=10, **kwargs)  # type: ignore[arg-type]


def drawn(count: int, **kwargs: object) -> Counter[int]:
    draws = Draws(0, 0)
    return Counter(draw(LOGITS, params(**kwargs), draws)[0] for _ in range(count))


def test_temperature_zero_takes_the_first_of_the_most_likely() -> None:
    """Its logprob is that at temperature 1."""
    token, logprob = draw(torch.tensor([1.0, 2.0, 2.0]), params(temperature=0), Draws(0, 0))
    assert token == 1
    assert logprob == pytest.approx(float(torch.tensor([1.0, 2.0, 2.0]).log_softmax(0)[1]))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_distribution(temperature: float) -> None:
    """20,000 draws stay within five standard deviations of each probability."""
    expected = (LOGITS.double() / temperature).softmax(0).numpy()
    counts = drawn(20_000, temperature=temperature)
    for token, probability in enumerate(expected):
        sigma = np.sqrt(20_000 * probability * (1 - probability))
        assert abs(counts[token] - 20_000 * probability) < 5 * sigma


def test_logprobs_are_those_of_the_distribution_drawn_from() -> None:
    """Temperature, top_k and top_p applied, renormalised."""
    cut = LOGITS.double()[[1, 4, 2]] / 0.7
    expected = dict(zip([1, 4, 2], cut.log_softmax(0).tolist(), strict=True))
    draws = Draws(1, 0)
    for _ in range(50):
        token, logprob = draw(LOGITS, params(temperature=0.7, top_k=3), draws)
        assert logprob == pytest.approx(expected[token])


def test_top_k_and_top_p_cut() -> None:
    """top_k 1 is the argmax; top_p keeps the fewest tokens that reach it."""
    assert set(drawn(200, top_k=1)) == {1}
    assert set(drawn(2000, top_k=2)) == {1, 4}
    probabilities = LOGITS.softmax(0)
    assert set(drawn(200, top_p=float(probabilities[1]) - 1e-3)) == {1}
    assert set(drawn(2000, top_p=float(probabilities[1]) + 1e-3)) == {1, 4}
    assert set(drawn(5000, top_p=1.0, top_k=99)) == {0, 1, 2, 3, 4}


def test_the_same_seed_draws_the_same_and_others_differ() -> None:
    """Numbers depend on seed and sequence index, and on nothing else."""

    def numbers(seed: int, index: int) -> list[float]:
        draws = Draws(seed, index)
        return [draws.next() for _ in range(8)]

    assert numbers(3, 1) == numbers(3, 1)
    assert numbers(3, 1) != numbers(3, 2)
    assert numbers(3, 1) != numbers(4, 1)
    assert numbers(-1, 0) == numbers(2**64 - 1, 0)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e300])
def test_extreme_temperatures_are_still_distributions(temperature: float) -> None:
    """Next to 0 it is the argmax with logprob 0; very hot it is uniform."""
    draws = Draws(0, 0)
    made = [draw(LOGITS, params(temperature=temperature), draws) for _ in range(100)]
    if temperature < 1:
        assert set(made) == {(1, 0.0)}
    else:
        assert {token for token, _ in made} == {0, 1, 2, 3, 4}
        assert made[0][1] == pytest.approx(-np.log(5))


def test_impossible_tokens_are_never_drawn() -> None:
    """Probability 0 stays 0, at the end of the vocabulary too."""
    logits = torch.tensor([0.0, 0.0, float("-inf")])
    draws = Draws(0, 0)
    assert {draw(logits, params(), draws)[0] for _ in range(500)} == {0, 1}


def decode(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode("utf-8", errors="replace")


def ends(check: StopCheck, text: bytes) -> tuple[int, StopReason] | None:
    for count, token in enumerate(text, 1):
        reason = check.add(token)
        if reason is not None:
            return count, reason
    return None


def test_a_stop_string_spread_over_tokens_ends_with_its_last() -> None:
    """Multi-byte characters, too."""
    check = StopCheck(params(stop_strings=("ö!", "END")), [], decode)
    assert ends(check, "aö!b".encode()) == (4, StopReason.STOP)
    check = StopCheck(params(stop_strings=("ö!", "END")), [], decode)
    assert ends(check, b"xEND") == (4, StopReason.STOP)


def test_eos_counts_only_where_it_is_wanted() -> None:
    """An empty stop condition never stops; length always does."""
    assert ends(StopCheck(params(), [7], decode), b"ab\x07c") == (3, StopReason.STOP)
    never = StopCheck(params(stop_at_eos=False), [7], decode)
    assert ends(never, b"ab\x07" + b"c" * 20) == (10, StopReason.LENGTH)
    token = StopCheck(params(stop_tokens=(98,), stop_at_eos=False), [7], decode)
    assert ends(token, b"a\x07b") == (3, StopReason.STOP)
