"""When calls that are made again on GPUs count as the same."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from tinsmithd.errors import Reason, Unavailable
from tinsmithd.training.call import Composition, are_close
from tinsmithd.training.models.recovery import Recovery


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


CPU = {"device": "cpu", "zero_stage": "1"}
GPU = {"device": "NVIDIA H200", "zero_stage": "1"}
IN_ORDER = {**GPU, "deterministic": "True"}


@pytest.mark.parametrize(
    ("recorded", "now", "differing"),
    [
        (CPU, CPU, ""),
        (CPU, {**CPU, "threads": "2"}, "threads"),
        (GPU, {**GPU, "threads": "2"}, ""),
        (GPU, {**GPU, "zero_stage": "3"}, "zero_stage"),
        (IN_ORDER, IN_ORDER, ""),
        (IN_ORDER, {**IN_ORDER, "threads": "2"}, "threads"),
        # Bits that came by chance cannot be asked for, nor of ranks that leave them to chance.
        (GPU, IN_ORDER, ""),
        (IN_ORDER, GPU, ""),
    ],
)
def test_ranks_that_repeat_bits_must_be_of_the_same_kind(
    recorded: Mapping[str, str], now: Mapping[str, str], differing: str
) -> None:
    """Where a call could give the same bits when it was made, and can now; else close will do."""
    found: list[Sequence[str]] = []
    recovery = Recovery.__new__(Recovery)
    recovery._exact = True
    recovery._model = SimpleNamespace(identity={})  # type: ignore[assignment]

    def mismatch(keys: Sequence[str], *_: object) -> Unavailable:
        found.append(keys)
        return Unavailable("differs", Reason.RANK_GROUP_MISMATCH)

    recovery._mismatch = mismatch  # type: ignore[method-assign]
    group: Any = SimpleNamespace(identity=now)
    with pytest.raises(Unavailable) if differing else contextlib.nullcontext():
        recovery._check_fits(group, [Composition(recorded)])
    assert found == ([[differing]] if differing else [])
