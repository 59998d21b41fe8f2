"""When calls that are made again on GPUs count as the same."""

import math

from tinsmithd.training.call import are_close


def loss(value: float, **more: float) -> dict[str, float]:
    return {"loss:sum": value, **more}


def test_a_difference_of_a_hundredth_is_rounding() -> None:
    """More is none; nor is another set of metrics, or no number."""
    assert are_close(loss(-500.0), loss(-504.0), 100)
    assert not are_close(loss(-500.0), loss(-520.0), 100)
    assert not are_close(loss(1.0), loss(1.0, other=1.0), 100)
    assert not are_close(loss(math.nan), loss(math.nan), 100)


def test_a_sum_near_zero_of_many_tokens_is_held_to_what_its_parts_are() -> None:
    """Advantages of both signs: a few thousandths of a token each, whatever the sum itself is."""
    assert are_close(loss(0.4), loss(-0.5), 4096)
    assert not are_close(loss(0.4), loss(-0.5), 40)
    assert not are_close(loss(30.0), loss(-30.0), 4096)


def test_what_is_no_sum_has_no_tokens() -> None:
    """The norm of a step is held to itself."""
    norm, other = ({"grad_norm:last": value} for value in (0.5, 0.55))
    assert not are_close(norm, other, 0)
    assert not are_close(norm, other, 4096)
    assert are_close({"grad_norm:last": 1e-4}, {"grad_norm:last": 9e-4}, 0)
