"""The data of the rows: seeded tokens, and lengths as the workloads say."""

from collections.abc import Sequence

import numpy as np

from tinsmithd.domain import Datum

PADDING_FACTOR = 2.9
PADDING_TOLERANCE = 0.1
SEEDS_MAX = 10_000


def make_datum(
    rng: np.random.Generator, length: int, vocab: int, *, zero_share: float = 0
) -> Datum:
    """One cross-entropy datum of random tokens.

    Args:
        rng: Where the values come from.
        length: Tokens.
        vocab: Tokens are below it.
        zero_share: So much of the weights, from the start, is 0; the others are 1.
    """
    tokens = rng.integers(0, vocab, length + 1)
    weights = np.ones(length, np.float32)
    weights[: int(length * zero_share)] = 0
    return Datum(tokens[:-1].copy(), {"target_tokens": tokens[1:].copy(), "weights": weights})


def make_batch(
    lengths: Sequence[int], vocab: int, *, seed: int = 0, zero_share: float = 0
) -> list[Datum]:
    """One datum of each length."""
    rng = np.random.default_rng(seed)
    return [make_datum(rng, length, vocab, zero_share=zero_share) for length in lengths]


def log_normal_lengths(
    seed: int, rows: int, *, median: float, cap: int, floor: int = 4
) -> list[int]:
    """Lengths of a log-normal distribution with sigma 1."""
    values = np.random.default_rng(seed).lognormal(np.log(median), 1.0, rows)
    return [int(value) for value in values.round().clip(floor, cap)]


def padding_factor(lengths: Sequence[int]) -> float:
    """Tokens of the padded batch for each real token."""
    return len(lengths) * max(lengths) / sum(lengths)


def padded_batches(
    count: int, rows: int = 8, *, median: float = 64, cap: int = 512
) -> list[list[int]]:
    """Lengths of the first seeds whose padding factor is about `PADDING_FACTOR`."""
    found: list[list[int]] = []
    for seed in range(SEEDS_MAX):
        lengths = log_normal_lengths(seed, rows, median=median, cap=cap)
        if abs(padding_factor(lengths) - PADDING_FACTOR) <= PADDING_TOLERANCE:
            found.append(lengths)
            if len(found) == count:
                return found
    raise AssertionError(f"{SEEDS_MAX} seeds gave only {len(found)} such batches")
