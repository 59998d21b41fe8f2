"""Chooses the composition of a batch: what is computed together, and on which rank."""

import heapq
from collections.abc import Sequence

from tinsmithd.trainer.composition import micro_batches
from tinsmithd.trainer.composition.rounds import MicroBatch, Round

ATTENTION_TOKENS = 32_768
"""A datum of so many tokens costs as much in its attention as in all else: from 8 thousand in small
models to 100 thousand in large ones."""


def compose(
    lengths: Sequence[int],
    *,
    tokens_max: int,
    plain_tokens_max: int | None,
    world_size: int,
    in_step: bool,
) -> list[Round]:
    """Deal micro-batches out to the ranks.

    One rank computes one in each round, and outputs go out after each. Ranks that walk together
    have one each in a round, of like size. Others have one round, in which each has micro-batches
    that cost about the same together, and share outputs once.

    Args:
        lengths: Number of tokens of each datum.
        tokens_max: Maximum tokens of a micro-batch; a longer datum is one by itself.
        plain_tokens_max: Maximum tokens whose activations fit into memory until the backward pass.
            With more tokens, that pass computes layers again. None without a backward pass.
        world_size: Number of ranks.
        in_step: Whether several ranks must walk through the model together.
    """
    if plain_tokens_max is not None:
        tokens_max = min(tokens_max, max(plain_tokens_max, 1))

    def micro_batch(indices: Sequence[int], longest: int) -> MicroBatch:
        recompute = plain_tokens_max is not None and longest > plain_tokens_max
        return MicroBatch(tuple(indices), recompute)

    def tokens(indices: Sequence[int]) -> int:
        return sum(lengths[index] for index in indices)

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
    places = _dealt([sum(cost(lengths[i]) for i in m) for m in cut], world_size)
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
