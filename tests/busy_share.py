"""How busy ranks are, simulated: what is composed for a call, without any computation.

A rank is busy for what its data cost; all wait for the dearest rank of a round.
"""

import random
from collections.abc import Mapping, Sequence

from tinsmithd.trainer.composition.compose import ATTENTION_TOKENS, compose, cost
from tinsmithd.trainer.composition.rounds import Round
from tinsmithd.training.call import batch_sizes

QUANTUM_TOKENS, MICRO_BATCH_TOKENS_MAX = 16_384, 2048
"""Defaults of the settings."""
RANKS = (1, 2, 4, 8, 16, 64)
DATA_PER_RANK = 32


def mixed(count: int) -> list[int]:
    """Lengths of 512 to 32,768 tokens, as many between 512 and 1,024 as in each doubling."""
    rng = random.Random(1)
    return [int(512 * 64 ** rng.random()) for _ in range(count)]


def of_length(tokens: int) -> Mapping[int, list[int]]:
    """Data of one length, by number of ranks."""
    return {ranks: [tokens] * DATA_PER_RANK * ranks for ranks in RANKS}


CALLS: Mapping[str, Mapping[int, Sequence[int]]] = {
    **{f"{tokens:,}": of_length(tokens) for tokens in (512, 2048, 8192, 32_768)},
    "512 to 32,768": {ranks: mixed(DATA_PER_RANK * ranks) for ranks in RANKS},
}
"""Lengths of the data of a call, by what they are and number of ranks."""


def busy_share(
    lengths: Sequence[int], ranks: int, *, in_step: bool, sequence_parallel: int = 1
) -> float:
    """Share of the ranks' time in which they compute the data of a call."""
    worked, waited, start = 0.0, 0.0, 0
    for size in batch_sizes(lengths, QUANTUM_TOKENS, ranks):
        batch = lengths[start : start + size]
        start += size
        for round_ in compose(
            batch,
            tokens_max=MICRO_BATCH_TOKENS_MAX,
            plain_tokens_max=ATTENTION_TOKENS,
            world_size=ranks,
            in_step=in_step and ranks > 1,
            sequence_parallel=sequence_parallel,
        ):
            costs = _costs(batch, round_)
            worked += sum(costs)
            waited += ranks * max(costs)
    assert start == len(lengths)
    return worked / waited


def _costs(batch: Sequence[int], round_: Round) -> list[float]:
    """Of each rank; ranks that compute a datum together share what it costs."""
    found = [0.0] * len(round_)
    for rank, of_rank in enumerate(round_):
        for m in of_rank:
            for neighbour in range(rank, rank + m.ranks):
                found[neighbour] += sum(cost(batch[i]) for i in m.indices) / m.ranks
    return found
