"""In which composition a call is computed, as bytes."""

import pytest

from tinsmithd.trainer.composition import rounds
from tinsmithd.trainer.composition.rounds import CompositionMismatch, MicroBatch, Round

ROUNDS: list[Round] = [
    ((MicroBatch((4, 0)),), (MicroBatch((1,), True), MicroBatch((3,)))),
    ((MicroBatch((2,)),), ()),
]


def decode(
    composition: bytes, *, count: int = 5, ranks: int = 2, in_step: bool = False
) -> list[Round]:
    return rounds.decode(composition, data_count=count, world_size=ranks, in_step=in_step)


def test_a_composition_is_read_as_it_was_written() -> None:
    """And it is small."""
    composition = rounds.encode(ROUNDS, 2)
    assert decode(composition) == ROUNDS
    assert composition == b'{"ranks":2,"rounds":[[[[0,[4,0]]],[[1,[1]],[0,[3]]]],[[[0,[2]]],[]]]}'
    assert decode(rounds.encode([], 3), count=0, ranks=3) == []


def test_what_shares_says_so_and_nothing_else_does() -> None:
    """Recomputed or not; ranks learn it of each other."""
    shared: Round = (
        (MicroBatch((4, 0), shares=True),),
        (MicroBatch((1,)), MicroBatch((3, 2), True, shares=True)),
    )
    composition = rounds.encode([shared], 2)
    assert composition == (b'{"ranks":2,"rounds":[[[[0,[4,0],1,1]],[[0,[1]],[1,[3,2],1,1]]]]}')
    assert decode(composition) == [shared]
    composed: Round = ((MicroBatch((0, 1, 2), shares=True),), ())
    executed: Round = (
        (MicroBatch((0,), True, shares=True), MicroBatch((1, 2), shares=True)),
        (),
    )
    marks = [rounds.marks(composed, rank, executed[rank]) for rank in range(2)]
    summed = [sum(column) for column in zip(*marks, strict=True)]
    assert rounds.from_marks(composed, summed) == executed


@pytest.mark.parametrize(
    "composition",
    [
        b"one by one",
        b"\xff",
        b"[]",
        b'{"ranks":2}',
        b'{"ranks":2,"rounds":[[[[0,[]]],[]]]}',
        b'{"ranks":2,"rounds":[[[[0,[true]]],[]]]}',
        b'{"ranks":2,"rounds":[[[[0,["0"]]],[]]]}',
        b'{"ranks":2,"rounds":[[[[0]],[]]]}',
        b'{"ranks":2,"rounds":[[[[0,[0],1,2]],[]]]}',
        b'{"ranks":2,"rounds":[[[[0,[0],2,1]],[]]]}',
        b'{"ranks":2,"rounds":[[[[0,[0],1,true]],[]]]}',
        b'{"ranks":2,"rounds":[[[[0,[0],1,1,1]],[]]]}',
        b'{"ranks":2,"rounds":[[[0],[]]]}',
        b'{"ranks":2,"rounds":7}',
    ],
)
def test_what_is_no_composition_is_refused(composition: bytes) -> None:
    """With one error, whatever is wrong with it."""
    with pytest.raises(CompositionMismatch, match="not a composition"):
        decode(composition, count=1)


def test_a_plan_of_other_ranks_or_data_is_refused() -> None:
    """Another number of ranks; data that are missing, there twice, or not there at all."""
    with pytest.raises(CompositionMismatch, match=r"one of 2 rank\(s\), here are 1"):
        decode(rounds.encode(ROUNDS, 2), ranks=1)
    with pytest.raises(CompositionMismatch, match="rank"):
        decode(rounds.encode([*ROUNDS, ((),)], 2))
    for count in (4, 6):
        with pytest.raises(CompositionMismatch, match=f"each of {count} data once"):
            decode(rounds.encode(ROUNDS, 2), count=count)
    for indices in ((0, 0), (-1, 0), (0, 2)):
        with pytest.raises(CompositionMismatch, match="each of 2 data once"):
            decode(rounds.encode([((MicroBatch(indices),),)], 1), count=2, ranks=1)


def test_ranks_that_share_one_base_must_walk_together() -> None:
    """One micro-batch each at most, and all recompute or none; idle ranks are fine."""
    together: list[Round] = [((MicroBatch((0, 1)),), ()), ((MicroBatch((2,), True),), ())]
    assert decode(rounds.encode(together, 2), count=3, in_step=True) == together
    apart: list[Round] = [
        ((MicroBatch((0,)), MicroBatch((1,))), ()),
        ((MicroBatch((0,)),), (MicroBatch((1,), True),)),
        ((), ()),
    ]
    for round_ in apart:
        rest = () if round_[0] else (MicroBatch((0,)), MicroBatch((1,)))
        composition = rounds.encode([round_, *[((m,), ()) for m in rest]], 2)
        assert decode(composition, count=2)
        with pytest.raises(CompositionMismatch, match="lets ranks part"):
            decode(composition, count=2, in_step=True)


SPREAD: list[Round] = [
    ((MicroBatch((1,), True, 2),), (), (MicroBatch((0,), True, 2),), ()),
    ((MicroBatch((3,), False, 4),), (), (), ()),
    ((MicroBatch((2,)),), (), (), ()),
]


def test_a_composition_says_over_how_many_ranks_data_are_spread() -> None:
    """Also where ranks must walk together; what is not spread is written as it always was."""
    composition = rounds.encode(SPREAD, 4)
    assert b"[1,[1],2]" in composition
    assert b"[0,[2]]" in composition
    for in_step in (False, True):
        assert decode(composition, count=4, ranks=4, in_step=in_step) == SPREAD
    marks = [rounds.marks(SPREAD[0], rank, SPREAD[0][rank]) for rank in range(4)]
    summed = [sum(column) for column in zip(*marks, strict=True)]
    assert rounds.from_marks(SPREAD[0], summed) == SPREAD[0]


@pytest.mark.parametrize(
    "round_",
    [
        ((MicroBatch((0,), False, 2),), (MicroBatch((1,)),)),
        ((), (MicroBatch((0,), False, 2), MicroBatch((1,), False, 2))),
        ((MicroBatch((0,), False, 2), MicroBatch((1,))), ()),
        ((MicroBatch((0, 1), False, 3),), ()),
        ((MicroBatch((0, 1), False, 4),), ()),
    ],
)
def test_data_are_spread_over_ranks_that_do_nothing_else(round_: Round) -> None:
    """Groups of equal size, with the micro-batch at the first rank of each."""
    with pytest.raises(CompositionMismatch, match="spreads data"):
        decode(rounds.encode([round_], 2), count=2)
    for ranks in (0, -2, True):
        composition = b'{"ranks":2,"rounds":[[[[0,[0,1],%d]],[]]]}' % ranks
        if ranks is not True:
            with pytest.raises(CompositionMismatch, match="not a composition"):
                decode(composition, count=2)


def test_what_ranks_split_is_put_together_from_their_marks() -> None:
    """Each rank knows its own part; the sums of all marks tell all of it."""
    composed: Round = ((MicroBatch((5, 2, 7)),), (MicroBatch((1, 0)),), ())
    executed: Round = (
        (MicroBatch((5,)), MicroBatch((2,), True), MicroBatch((7,), True)),
        (MicroBatch((1, 0)),),
        (),
    )
    marks = [rounds.marks(composed, rank, executed[rank]) for rank in range(3)]
    assert rounds.from_marks(composed, [sum(column) for column in zip(*marks, strict=True)]) == (
        executed
    )
