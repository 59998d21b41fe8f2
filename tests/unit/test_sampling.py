"""Drawing tokens and ending sequences."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tinsmithd.domain import SamplingParams, StopReason
from tinsmithd.sampler.engines.stopping import StopCheck
from tinsmithd.sampler.engines.transformers import sampling
from tinsmithd.sampler.engines.transformers.sampling import Ask, Drawn, Draws, Workspace

LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.5, 2.5])


def params(**kwargs: object) -> SamplingParams:
    return SamplingParams(max_tokens=10, **kwargs)  # type: ignore[arg-type]


def draw(logits: torch.Tensor, how: SamplingParams, draws: Draws) -> tuple[int, float]:
    """One draw."""
    number = draws.next() if how.temperature else 0.0
    (made,) = sampling.draw(logits[None], [Ask(0, how, number)], Workspace())
    assert made is not None
    return made.token, made.logprob


def drawn(count: int, **kwargs: object) -> Counter[int]:
    """How often each token is drawn, by the numbers of a sequence."""
    how, draws = params(**kwargs), Draws(0, 0)
    asks = [Ask(0, how, draws.next()) for _ in range(count)]
    return Counter(made.token for made in sampling.draw(LOGITS[None], asks, Workspace()) if made)


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


# --- batches --------------------------------------------------------------------------------------

HOW = (
    {},
    {"temperature": 0.6},
    {"temperature": 0},
    {"top_k": 40},
    {"top_p": 0.9},
    {"temperature": 1.3, "top_k": 2000, "top_p": 0.97},
    {"temperature": 2.5, "top_p": 0.999},
)


def exact(logits: torch.Tensor, how: SamplingParams) -> np.ndarray:
    """Logprobs of the stated distribution in float64, -inf for what is cut; `(V,)`."""
    values = logits.double().numpy() / (how.temperature or 1)
    order = np.argsort(-values, kind="stable")
    kept = order[: how.top_k] if 0 < how.top_k < len(values) and how.temperature else order
    weights = np.exp(values[kept] - values.max())
    if how.top_p < 1 and how.temperature:
        enough = int((weights.cumsum() >= how.top_p * weights.sum()).argmax()) + 1
        kept, weights = kept[:enough], weights[:enough]
    found = np.full(len(values), -np.inf)
    with np.errstate(divide="ignore"):
        found[kept] = np.log(weights / weights.sum())
    return found


@pytest.mark.parametrize("vocab", [5, 320, 50_257, 151_936])
@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_a_row_of_a_batch_is_as_alone_and_stated_to_1e_6(vocab: int, scale: float) -> None:
    """Bit for bit, whatever the neighbours are, in every order; top-k of the same distribution."""
    torch.manual_seed(vocab)
    logits = torch.randn(21, vocab) * scale
    logits[3, 1] = -torch.inf
    asks = [
        Ask(row, params(**HOW[row % len(HOW)]), Draws(row, 0).next(), topk=4 * (row % 3 == 0))
        for row in range(len(logits))
    ]
    together = sampling.draw(logits, asks, Workspace())
    backwards = [Ask(20 - a.row, a.params, a.number, a.topk) for a in asks]
    reverse = sampling.draw(logits.flip(0), backwards[::-1], Workspace())[::-1]
    for ask, found, other in zip(asks, together, reverse, strict=True):
        (alone,) = sampling.draw(
            logits[ask.row, None], [Ask(0, ask.params, ask.number, ask.topk)], Workspace()
        )
        for one in (alone, other):
            assert found is not None
            assert one is not None
            assert (one.token, one.logprob) == (found.token, found.logprob)
        stated = exact(logits[ask.row], ask.params)
        assert found is not None
        assert found.logprob == pytest.approx(stated[found.token], abs=1e-6)
        if ask.topk:
            order = np.argsort(-stated, kind="stable")[: ask.topk]
            order = order[stated[order] > -np.inf]
            assert found.topk_ids is not None
            assert found.topk_logprobs is not None
            assert found.topk_ids[: len(order)].tolist() == order.tolist()
            np.testing.assert_allclose(found.topk_logprobs[: len(order)], stated[order], atol=2e-6)
            assert np.isnan(found.topk_logprobs[len(order) :]).all()


def test_draws_pass_a_chi_square_test() -> None:
    """60,000 draws over 700 tokens, by a sequence's numbers: p above 1e-4."""
    torch.manual_seed(1)
    logits = torch.randn(1, 700) * 2
    probabilities = np.exp(exact(logits[0], params()))
    count = 60_000
    numbers = Draws(7, 1).table(1, count)[0]
    asks = [Ask(0, params(), float(number)) for number in numbers]
    made = Counter(drawn.token for drawn in sampling.draw(logits, asks, Workspace()) if drawn)
    assert made.total() == count
    seen = np.array([made[token] for token in range(700)])
    order = np.argsort(-probabilities)
    likely = order[probabilities[order] * count >= 10]
    rest = np.setdiff1d(np.arange(700), likely)
    observed = np.append(seen[likely], seen[rest].sum())
    expected = np.append(probabilities[likely], probabilities[rest].sum()) * count
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    # Wilson and Hilferty: the cube root of chi-square / freedom is nearly normal.
    deviation = (statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))
    assert deviation / np.sqrt(2 / (9 * freedom)) < 3.72


@pytest.mark.parametrize("how", [how for how in HOW if how.get("temperature") != 0])
def test_each_token_is_drawn_by_its_share_of_all_numbers(how: dict[str, float]) -> None:
    """Of 4,000 numbers at equal distances, to two; none where the probability is 0.

    A token stands for one interval as long as its probability, so there is no chance in it: what is
    wrong by 0.00075 fails. Of 60,000 random draws a chi-square test that passes 9,999 of 10,000
    right ones notices 0.007 (40 tokens) to 0.012 (450), at a token of 0.05, nine times in ten.
    """
    torch.manual_seed(1)
    logits = torch.randn(1, 700) * 2
    count = 4_000
    asks = [Ask(0, params(**how), (n + 0.5) / count) for n in range(count)]
    made = Counter(drawn.token for drawn in sampling.draw(logits, asks, Workspace()) if drawn)
    assert made.total() == count
    seen = np.array([made[token] for token in range(700)])
    probabilities = np.exp(exact(logits[0], params(**how)))
    assert not seen[probabilities == 0].any()
    assert np.abs(seen - probabilities * count).max() < 2


def test_every_number_draws_the_token_that_it_stands_for() -> None:
    """Against the inverse of the cumulative distribution in float64, away from its steps."""
    torch.manual_seed(2)
    logits = torch.randn(1, 1000) * 3
    cumulative = np.exp(exact(logits[0], params())).cumsum()
    numbers = np.linspace(0, 1, 4001)[:-1]
    asks = [Ask(0, params(), float(number)) for number in numbers]
    for number, drawn in zip(numbers, sampling.draw(logits, asks, Workspace()), strict=True):
        assert drawn is not None
        if np.abs(cumulative - number).min() > 1e-6:
            assert drawn.token == int(np.searchsorted(cumulative, number, side="right"))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_no_distribution_gives_nothing_and_disturbs_nobody(bad: float) -> None:
    """NaN, infinity, and a row in which nothing is possible."""
    logits = torch.stack([LOGITS, LOGITS, torch.full_like(LOGITS, -torch.inf)])
    logits[1, 2] = bad
    asks = [Ask(row, params(top_p=p), 0.5) for row in range(3) for p in (1.0, 0.5)]
    found = sampling.draw(logits, asks, Workspace())
    expected = sampling.draw(logits[:1], asks[:2], Workspace())
    assert found == [*expected, None, None, None, None]
    assert all(isinstance(made, Drawn) for made in expected)


# --- ends -----------------------------------------------------------------------------------------


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
