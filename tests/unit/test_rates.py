"""What a tenant may use in a minute: to the limit and no further, and given back where unused."""

import pytest

from tinsmithd.errors import InvalidArgument, Reason, ResourceExhausted
from tinsmithd.rates import TENANTS_MAX, Rates


class _Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_as_much_as_the_limit_passes_and_one_more_does_not() -> None:
    clock = _Clock()
    rates = Rates("tokens_max", clock)
    for _ in range(3):
        rates.take("a", 20, 60, "data")
    with pytest.raises(ResourceExhausted) as refused:
        rates.take("a", 1, 60, "data")
    assert refused.value.reason is Reason.QUOTA_EXCEEDED
    assert refused.value.metadata == {"limit": "tokens_max", "value": "61"}
    assert refused.value.retry_after_s == pytest.approx(1.0)
    rates.take("b", 60, 60, "data")  # another tenant's is its own
    clock.now_s = 1.0
    rates.take("a", 1, 60, "data")


def test_more_than_ever_passes_is_refused_for_good() -> None:
    with pytest.raises(InvalidArgument) as refused:
        Rates("tokens_max").take("a", 61, 60, "data")
    assert refused.value.reason is Reason.LIMIT_EXCEEDED
    assert refused.value.field == "data"


def test_what_was_not_used_is_given_back() -> None:
    rates = Rates("tokens_max", _Clock())
    rates.take("a", 60, 60, "data")
    rates.give_back("a", 10, 60)
    rates.take("a", 10, 60, "data")
    with pytest.raises(ResourceExhausted):
        rates.take("a", 1, 60, "data")


def test_without_a_limit_nothing_is_remembered_and_tenants_are_bounded() -> None:
    rates = Rates("tokens_max", _Clock())
    rates.take("a", 10**12, 0, "data")
    assert not rates._used
    for number in range(TENANTS_MAX + 10):
        rates.take(f"{number}", 1, 60, "data")
    assert len(rates._used) == TENANTS_MAX
