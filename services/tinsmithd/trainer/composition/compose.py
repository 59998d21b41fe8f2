"""Chooses the composition of a batch: what is computed together, and on which rank."""

import heapq
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tinsmithd.trainer import prefixes
from tinsmithd.trainer.composition import micro_batches
from tinsmithd.trainer.composition.rounds import MicroBatch, Round

ATTENTION_TOKENS = 32_768
"""A datum of so many tokens costs as much in its attention as in all else: from 8 thousand in small
models to 100 thousand in large ones."""


def compose_data(
    tokens: Sequence[np.ndarray],
    *,
    share: bool,
    tokens_max: int,
    plain_tokens_max: int | None,
    world_size: int,
    in_step: bool,
    sequence_parallel: int = 1,
    long_tokens_max: int = sys.maxsize,
    context_key_tokens: float = 0.0,
) -> list[Round]:
    """Compose data, of which those that begin alike are kept together.

    Args:
        tokens: Of each datum, int64 `(N,)`.
        share: Whether what several data begin with is computed once.
        tokens_max, plain_tokens_max, world_size, in_step, sequence_parallel: See `compose`.
        long_tokens_max: Maximum tokens of data that share with one that is longer than
            `tokens_max`, see `prefixes.units`.
        context_key_tokens: What a key of a segment above keeps for the backward pass, in tokens.
    """
    every = [prefixes.Unit((index,), len(row), len(row)) for index, row in enumerate(tokens)]
    if share and len(tokens) > 1:
        if in_step and plain_tokens_max is not None:
            # Running out of memory would end the group: no more than is known to fit.
            long_tokens_max = min(long_tokens_max, plain_tokens_max)
        every = prefixes.units(
            tokens,
            tokens_max=_most(tokens_max, plain_tokens_max),
            world_size=world_size,
            # Where several ranks compute a long datum, it is alone.
            long_tokens_max=long_tokens_max if sequence_parallel == 1 else 0,
            context_key_tokens=0.0 if plain_tokens_max is None else context_key_tokens,
        )
    composed = compose(
        [unit.size for unit in every],
        tokens_max=tokens_max,
        plain_tokens_max=plain_tokens_max,
        world_size=world_size,
        in_step=in_step,
        sequence_parallel=sequence_parallel,
    )

    def data_of(micro_batch: MicroBatch) -> MicroBatch:
        some = [every[index].data for index in micro_batch.indices]
        data = tuple(datum for unit in some for datum in unit)
        return replace(micro_batch, indices=data, shares=len(data) > len(some))

    return [tuple(tuple(map(data_of, of_rank)) for of_rank in round_) for round_ in composed]


def compose(
    lengths: Sequence[int],
    *,
    tokens_max: int,
    plain_tokens_max: int | None,
    world_size: int,
    in_step: bool,
    sequence_parallel: int = 1,
) -> list[Round]:
    """Deal micro-batches out to the ranks.

    One rank computes one in each round, and outputs go out after each. Ranks that walk together
    have one each in a round, of like size. Others have one round, in which each has micro-batches
    that cost about the same together, and share outputs once. Data that are too long for one rank
    have rounds of their own before, in which several compute each together.

    Args:
        lengths: Number of tokens of each datum.
        tokens_max: Maximum tokens of a micro-batch; a longer datum is one by itself.
        plain_tokens_max: Maximum tokens whose activations fit into memory until the backward pass.
            With more tokens, that pass computes layers again. None without a backward pass.
        world_size: Number of ranks.
        in_step: Whether several ranks must walk through the model together.
        sequence_parallel: Number of ranks that may compute a datum together; it divides
            `world_size`.
    """
    tokens_max = _most(tokens_max, plain_tokens_max)
    memory = _Memory(lengths, plain_tokens_max)
    long: list[int] = []
    if sequence_parallel > 1:
        long = _too_long(lengths, tokens_max, plain_tokens_max, world_size, sequence_parallel)
    spread = _spread(long, memory, world_size // sequence_parallel, sequence_parallel, in_step)
    rest = sorted(set(range(len(lengths))) - set(long))
    return spread + _whole(rest, memory, tokens_max, world_size, in_step)


def _most(tokens_max: int, plain_tokens_max: int | None) -> int:
    """Tokens of a micro-batch, if no datum is longer."""
    return tokens_max if plain_tokens_max is None else min(tokens_max, max(plain_tokens_max, 1))


@dataclass(frozen=True)
class _Memory:
    """Makes micro-batches, which recompute layers where memory demands it."""

    lengths: Sequence[int]
    plain_tokens_max: int | None

    def tokens(self, indices: Iterable[int]) -> int:
        return sum(self.lengths[index] for index in indices)

    def cost(self, indices: Iterable[int]) -> int:
        return sum(cost(self.lengths[index]) for index in indices)

    def micro_batch(self, indices: Iterable[int], longest: int, ranks: int = 1) -> MicroBatch:
        limit = self.plain_tokens_max
        return MicroBatch(tuple(indices), limit is not None and longest > ranks * limit, ranks)


def _too_long(
    lengths: Sequence[int],
    tokens_max: int,
    plain_tokens_max: int | None,
    world_size: int,
    sequence_parallel: int,
) -> list[int]:
    """Data that are longer than a micro-batch and do not fit into one rank's memory or time.

    The longest come first. A datum that costs more than a rank's share of what is left would keep
    the other ranks waiting.
    """
    found: list[int] = []
    left = sum(map(cost, lengths))
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        others_wait = cost(length) * world_size > left
        no_memory = plain_tokens_max is not None and length > plain_tokens_max
        if length <= tokens_max or length < sequence_parallel or not (others_wait or no_memory):
            break
        left -= cost(length)
        found.append(index)
    return found


def _spread(
    indices: Sequence[int], memory: _Memory, groups: int, ranks: int, in_step: bool
) -> list[Round]:
    """Rounds of data that `ranks` neighbours compute together, each alone; longest first."""
    if not indices:
        return []
    others: Round = ((),) * (ranks - 1)
    if not in_step:
        mine = _dealt([memory.cost([i]) for i in indices], groups)
        alone = [memory.micro_batch([i], memory.tokens([i]), ranks) for i in indices]
        dealt = [tuple(alone[place] for place in places) for places in mine]
        return [tuple(of for first in dealt for of in (first, *others))]
    rounds: list[Round] = []
    for start in range(0, len(indices), groups):
        now = indices[start : start + groups]
        longest = memory.tokens(now[:1])  # all must recompute or none of them
        firsts = [(memory.micro_batch([i], longest, ranks),) for i in now]
        firsts += [()] * (groups - len(now))  # type: ignore[list-item]
        rounds.append(tuple(of for first in firsts for of in (first, *others)))
    return rounds


def _whole(
    which: Sequence[int], memory: _Memory, tokens_max: int, world_size: int, in_step: bool
) -> list[Round]:
    """Rounds of data that one rank computes each."""
    if not which:
        return []
    lengths = [memory.lengths[index] for index in which]

    def micro_batch(places: Iterable[int], longest: int) -> MicroBatch:
        return memory.micro_batch((which[place] for place in places), longest)

    def tokens(places: Iterable[int]) -> int:
        return memory.tokens(which[place] for place in places)

    if in_step:
        in_rounds = micro_batches.cut_in_step(lengths, tokens_max=tokens_max, world_size=world_size)
        # All must recompute or none of them.
        return [
            tuple((micro_batch(m, max(map(tokens, of_ranks))),) if m else () for m in of_ranks)
            for of_ranks in in_rounds
        ]
    cut = micro_batches.cut(lengths, tokens_max=tokens_max, world_size=world_size)
    if world_size == 1:
        return [((micro_batch(m, tokens(m)),),) for m in cut]
    places = _dealt([memory.cost(which[i] for i in m) for m in cut], world_size)
    return [tuple(tuple(micro_batch(cut[p], tokens(cut[p])) for p in mine) for mine in places)]


def cost(length: int) -> int:
    """What a datum costs, in tokens of short data, times `ATTENTION_TOKENS`."""
    return length * (ATTENTION_TOKENS + length)


def _dealt(costs: Sequence[int], world_size: int) -> list[list[int]]:
    """Places of what each rank gets: the dearest first, each to the rank that has least yet."""
    loads = [(0, rank) for rank in range(world_size)]
    found: list[list[int]] = [[] for _ in range(world_size)]
    for place in sorted(range(len(costs)), key=lambda p: (-costs[p], p)):
        load, rank = heapq.heappop(loads)
        found[rank].append(place)
        heapq.heappush(loads, (load + costs[place], rank))
    return found
