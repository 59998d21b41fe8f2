"""Chooses the composition of a batch: what is computed together, and on which rank."""

from collections.abc import Sequence

from tinsmithd.trainer.composition import micro_batches
from tinsmithd.trainer.composition.rounds import MicroBatch, Round


def compose(
    lengths: Sequence[int],
    *,
    tokens_max: int,
    plain_tokens_max: int | None,
    world_size: int,
) -> list[Round]:
    """Deal micro-batches out to the ranks, of like size in each round.

    Args:
        lengths: Number of tokens of each datum.
        tokens_max: Maximum tokens of a micro-batch; a longer datum is one by itself.
        plain_tokens_max: Maximum tokens whose activations fit into memory until the backward pass.
            With more tokens, that pass computes layers again. None without a backward pass.
        world_size: Number of ranks.
    """
    if plain_tokens_max is not None:
        tokens_max = min(tokens_max, max(plain_tokens_max, 1))
    cut = micro_batches.cut(lengths, tokens_max=tokens_max, world_size=world_size)
    rounds: list[Round] = []
    for start in range(0, len(cut), world_size):
        in_round = cut[start : start + world_size]
        # Ranks that share one partitioned base must all recompute or none of them.
        longest = max(sum(lengths[index] for index in indices) for indices in in_round)
        recompute = plain_tokens_max is not None and longest > plain_tokens_max
        of_ranks: list[tuple[MicroBatch, ...]] = [()] * world_size
        for rank, indices in enumerate(in_round):
            of_ranks[rank] = (MicroBatch(tuple(indices), recompute),)
        rounds.append(tuple(of_ranks))
    return rounds
