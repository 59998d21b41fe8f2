"""What is counted of logprobs that are apart, and what of a rank's word for it is believed."""

import math

import numpy as np
import pytest

from tinsmith.internal.v1 import trainer_link_service_pb2 as pb
from tinsmithd.errors import InvalidArgument
from tinsmithd.mismatch import BOUNDS_NATS, Mismatch
from tinsmithd.training.ranks import Counts, WorkKind
from tinsmithd.training.ranks.claims import mismatch_of

SIZES = len(BOUNDS_NATS) + 1


def found(apart: list[float]) -> Mismatch:
    """Of one datum whose logprobs are so far from those that it was sampled with."""
    sampled = np.full(len(apart), -1.0, np.float32)
    inputs = {"logprobs": sampled, "advantages": np.ones(len(apart), np.float32)}
    mismatch = Mismatch()
    mismatch.add(sampled + np.array(apart, np.float32), inputs)
    return mismatch


def test_tokens_are_counted_by_how_far_they_are_apart() -> None:
    """Either way, a bound itself included; sums are of all that count."""
    mismatch = found([0.0, 0.5, -0.5, 1.0, -4.0])
    assert mismatch.tokens == [1, 0, 0, 0, 0, 0, 3, 1]
    assert mismatch.apart_nats == 6.0
    assert mismatch.kl_nats == 0.125 + 0.125 + 0.5 + 8.0


def test_what_is_no_number_does_not_spoil_the_sums() -> None:
    """A model that has become NaN is said elsewhere; these sums never come back from it."""
    mismatch = found([math.nan, -math.inf, 0.5])
    assert sum(mismatch.tokens) == 1
    assert mismatch.apart_nats == 0.5


def test_a_replay_does_not_count_again() -> None:
    """Nor does a batch without sampled tokens."""
    counts = Counts()
    counts.computed(WorkKind.FORWARD_BACKWARD, 2, 1.0, found([0.5, 0.5]))
    counts.computed(WorkKind.REPLAY, 2, 1.0, found([0.5, 0.5]))
    counts.computed(WorkKind.FORWARD, 2, 1.0, None)
    assert sum(counts.mismatch.tokens) == 2
    assert counts.mismatch.apart_nats == 1.0


@pytest.mark.parametrize(
    "said",
    [
        {"tokens": []},
        {"tokens": [1] * (SIZES + 1)},
        {"tokens": [3, -1] + [0] * (SIZES - 2)},
        {"tokens": [5] + [0] * (SIZES - 1)},
        {"apart_nats": math.nan},
        {"apart_nats": -1.0},
        {"kl_nats": math.inf},
    ],
)
def test_a_rank_is_not_believed_what_cannot_be(said: dict[str, object]) -> None:
    """Of four tokens at most."""
    good = {"tokens": [0, 4] + [0] * (SIZES - 2), "apart_nats": 4e-6, "kl_nats": 8e-12}
    assert mismatch_of(pb.Done(mismatch=pb.Mismatch(**good)), 4) == Mismatch(**good)
    with pytest.raises(InvalidArgument):
        mismatch_of(pb.Done(mismatch=pb.Mismatch(**{**good, **said})), 4)


def test_a_rank_may_say_nothing() -> None:
    """It does where the loss is given no sampling logprobs."""
    assert mismatch_of(pb.Done(), 4) is None
