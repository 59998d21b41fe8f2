"""A composition: how a batch was computed, and how it is computed again to the same bits.

A batch is computed in rounds. In a round each rank computes its micro-batches one after the other,
then all ranks share the outputs. Or the micro-batches of a round are spread: as many neighbours
compute each together, and it stands at the first of them. The rounding of a number depends on which
data are computed together, on how many ranks, on whether layers are recomputed in the backward
pass, on whether common beginnings are computed once, and on the rank that adds them up. It depends
on nothing else that a setting or free memory may change. So a batch that is computed again in its
composition gives the same bits.

As bytes a composition is compact JSON:

    {"ranks": 2, "rounds": [[[[0, [4], 2]], []], [[[0, [3, 1]]], [[0, [2, 5], 1, 1], [1, [0]]]]]}

A round is a list of ranks, a rank a list of micro-batches as `[recompute, indices of the data]`, a
third number where one is spread, over so many ranks, and a fourth, 1, where what the data begin
with is computed once: a release that does not know that refuses it.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any


class CompositionMismatch(ValueError):
    """A composition is not one of such a batch on such ranks; nothing was done."""


@dataclass(frozen=True)
class MicroBatch:
    """Data that are computed together.

    Attributes:
        indices: Of the data in the batch, in the order in which they stand in the micro-batch.
        recompute: Whether the backward pass computes each layer again.
        ranks: Number of ranks that compute it together, each a share of its tokens.
        shares: Whether what several data begin with is computed once (`prefixes`).
    """

    indices: tuple[int, ...]
    recompute: bool = False
    ranks: int = 1
    shares: bool = False

    @property
    def how(self) -> int:
        """How it is computed, as one number below 4, for `marks`."""
        return self.recompute + 2 * self.shares


Round = tuple[tuple[MicroBatch, ...], ...]
"""For each rank, what it computes before the ranks share outputs."""


def encode(rounds: Sequence[Round], world_size: int) -> bytes:
    """Write a composition."""
    found = [[[_encoded(m) for m in of_rank] for of_rank in round_] for round_ in rounds]
    return json.dumps({"ranks": world_size, "rounds": found}, separators=(",", ":")).encode()


def _encoded(m: MicroBatch) -> list[Any]:
    more = [m.ranks, 1] if m.shares else [m.ranks] if m.ranks > 1 else []
    return [int(m.recompute), list(m.indices), *more]


def decode(composition: bytes, *, data_count: int, world_size: int, in_step: bool) -> list[Round]:
    """Read a composition.

    Args:
        composition: What `encode` wrote.
        data_count: Number of data in the batch.
        world_size: Number of ranks.
        in_step: Whether the ranks must walk through the model together. Then each computes at most
            one micro-batch in a round, and all recompute or none does.

    Raises:
        CompositionMismatch: The bytes are no composition, or not one of such a batch on such ranks.
    """
    try:
        document = json.loads(composition)
        ranks = document["ranks"]
        rounds = [_round(found) for found in document["rounds"]]
    except (ValueError, TypeError, KeyError) as error:
        raise CompositionMismatch(f"not a composition of this engine: {error!r}") from error
    if ranks != world_size or any(len(round_) != world_size for round_ in rounds):
        message = f"the composition is one of {ranks} rank(s), here are {world_size}"
        raise CompositionMismatch(message)
    indices = [i for round_ in rounds for m in _micro_batches(round_) for i in m.indices]
    if sorted(indices) != list(range(data_count)):
        message = f"the composition does not have each of {data_count} data once"
        raise CompositionMismatch(message)
    if not all(_is_spread_evenly(round_) for round_ in rounds):
        raise CompositionMismatch("the composition spreads data over ranks that do other things")
    if in_step and not all(_is_in_step(round_) for round_ in rounds):
        raise CompositionMismatch("the composition lets ranks part that share one base")
    return rounds


def _round(found: Any) -> Round:
    return tuple(tuple(_micro_batch(*pair) for pair in of_rank) for of_rank in found)


def _micro_batch(recompute: Any, indices: Any, ranks: Any = 1, shares: Any = 0) -> MicroBatch:
    numbers = [recompute, ranks, shares, *indices]
    if not indices or ranks < 1 or not all(type(number) is int for number in numbers):
        raise ValueError("a micro-batch has one or more indices")
    if shares and (shares != 1 or ranks > 1):
        raise ValueError("a micro-batch shares or is spread")
    return MicroBatch(tuple(indices), bool(recompute), ranks, bool(shares))


def _computed(indices: tuple[int, ...], how: int, ranks: int) -> MicroBatch:
    return MicroBatch(indices, bool(how & 1), ranks, shares=bool(how & 2))


def spread_over(round_: Round) -> int:
    """Number of neighbours that compute each micro-batch of a round together."""
    return next((m.ranks for m in _micro_batches(round_)), 1)


def _is_spread_evenly(round_: Round) -> bool:
    ranks = spread_over(round_)
    alike = all(m.ranks == ranks for m in _micro_batches(round_))
    at_first = not any(of_rank for rank, of_rank in enumerate(round_) if rank % ranks)
    return alike and at_first and len(round_) % ranks == 0


def _is_in_step(round_: Round) -> bool:
    one_each = all(len(of_rank) <= 1 for of_rank in round_)
    return one_each and len({m.recompute for m in _micro_batches(round_)}) == 1


def _micro_batches(round_: Round) -> Iterator[MicroBatch]:
    for of_rank in round_:
        yield from of_rank


def indices_of(of_rank: Sequence[MicroBatch]) -> list[int]:
    """Indices of all data that a rank computes in a round, in order."""
    return [index for micro_batch in of_rank for index in micro_batch.indices]


# --- what one rank had to split, all must know ----------------------------------------------------


def marks(composed: Round, rank: int, executed: Sequence[MicroBatch]) -> list[int]:
    """One number for each datum of the round: how this rank executed it, 0 for other ranks' data.

    The sum over the ranks says what each executed.
    """
    found: list[int] = []
    for other, of_rank in enumerate(composed):
        if other != rank:
            found += [0] * len(indices_of(of_rank))
            continue
        for place, micro_batch in enumerate(executed, 1):
            found += [4 * place + micro_batch.how] * len(micro_batch.indices)
    return found


def from_marks(composed: Round, summed: Sequence[int]) -> Round:
    """The round as the ranks executed it.

    Args:
        composed: The round as it was composed; splitting keeps the order of a rank's data.
        summed: Sum of the ranks' `marks`.
    """
    rest = iter(summed)
    executed = []
    for of_rank in composed:
        pairs = [(next(rest), index) for index in indices_of(of_rank)]
        executed.append(
            tuple(
                _computed(tuple(index for _, index in group), mark % 4, spread_over(composed))
                for mark, group in groupby(pairs, key=lambda pair: pair[0])
            )
        )
    return tuple(executed)
