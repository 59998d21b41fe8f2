"""What did not fit into memory once is not tried again."""

from collections.abc import Sequence

from tinsmithd.trainer.composition.compose import compose
from tinsmithd.trainer.composition.limits import FoundLimits
from tinsmithd.trainer.composition.rounds import MicroBatch, Round

LENGTHS = [10, 20, 30, 40]
SETTINGS = (1000, 500)
"""Tokens of a micro-batch, and of one without recomputation."""


def tokens_of(micro_batch: MicroBatch) -> int:
    return sum(LENGTHS[index] for index in micro_batch.indices)


def learned(
    composed: Sequence[Round], executed: Sequence[Round], limits: FoundLimits | None = None
) -> FoundLimits:
    limits = limits or FoundLimits()
    limits.learn("kind", tokens_of, composed, executed)
    return limits


def test_what_was_executed_as_composed_teaches_nothing() -> None:
    """Nor does another kind of computation."""
    composed: list[Round] = [((MicroBatch((0, 1)),), (MicroBatch((2, 3), True),))]
    assert learned(composed, composed).apply("kind", *SETTINGS) == SETTINGS
    split: list[Round] = [((MicroBatch((0,)), MicroBatch((1,))), composed[0][1])]
    assert learned(composed, split).apply("other", *SETTINGS) == SETTINGS


def test_the_largest_part_that_fitted_is_the_most_that_is_tried() -> None:
    """On whichever rank; a call without a way back has no second limit."""
    composed: list[Round] = [((MicroBatch((0,)),), (MicroBatch((1, 2, 3)),))]
    executed: list[Round] = [((MicroBatch((0,)),), (MicroBatch((1, 2)), MicroBatch((3,))))]
    limits = learned(composed, executed)
    assert limits.apply("kind", *SETTINGS) == (50, 500)
    assert limits.apply("kind", 1000, None) == (50, None)
    assert limits.apply("kind", 45, 40) == (45, 40)
    smaller: list[Round] = [((MicroBatch((0,)), MicroBatch((1,))),)]
    assert learned([((MicroBatch((0, 1)),),)], smaller, limits).apply("kind", *SETTINGS)[0] == 20
    assert learned(composed, executed, limits).apply("kind", *SETTINGS)[0] == 20
    limits.forget()
    assert limits.apply("kind", *SETTINGS) == SETTINGS


def test_a_datum_that_had_to_be_recomputed_is_recomputed_at_once() -> None:
    """And so are longer ones; what was composed so says nothing about less."""
    composed: list[Round] = [((MicroBatch((2,)), MicroBatch((3,), True)),)]
    executed: list[Round] = [((MicroBatch((2,), True), MicroBatch((3,), True)),)]
    limits = learned(composed, executed)
    assert limits.apply("kind", *SETTINGS) == (1000, 29)
    split: list[Round] = [((MicroBatch((0, 1), True),),), ((MicroBatch((2,)),),)]
    pieces: list[Round] = [
        ((MicroBatch((0,), True), MicroBatch((1,), True)),),
        ((MicroBatch((2,)),),),
    ]
    assert learned(split, pieces).apply("kind", *SETTINGS) == (20, 500)


def test_the_next_composition_keeps_within_the_limits() -> None:
    """Micro-batches that fitted, and the rest recomputed."""
    limits = learned(
        [((MicroBatch((3, 2, 1, 0)),),)],
        [((MicroBatch((3,), True), MicroBatch((2, 1)), MicroBatch((0,))),)],
    )
    tokens_max, plain = limits.apply("kind", *SETTINGS)
    found = compose(
        LENGTHS, tokens_max=tokens_max, plain_tokens_max=plain, world_size=1, in_step=False
    )
    for ((micro_batch,),) in found:
        tokens = sum(LENGTHS[i] for i in micro_batch.indices)
        assert micro_batch.recompute == (tokens > 39)
        assert tokens <= 50
