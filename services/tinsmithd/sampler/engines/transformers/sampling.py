"""Draws a token from logits: exactly, repeatably, and independent of what else is running.

It computes in float64 and in a fixed order, so that the same logits and the same random number give
the same token on any machine and beside any neighbours.
"""

import math

import numpy as np
import torch

from tinsmithd.domain import SamplingParams


class Draws:
    """The random numbers of one sequence: counter-based, keyed by seed and sequence index."""

    def __init__(self, seed: int, sequence_index: int) -> None:
        key = [seed % (1 << 64), sequence_index]
        self._generator = np.random.Generator(np.random.Philox(key=np.array(key, np.uint64)))

    def next(self) -> float:
        """The next number, uniform in [0, 1)."""
        return float(self._generator.random())


def draw(logits: torch.Tensor, params: SamplingParams, draws: Draws) -> tuple[int, float]:
    """Draw one token.

    Args:
        logits: float `(V,)`.
        params: Temperature, top_k and top_p take effect in this order; temperature 0 takes the most
            likely token, the first of equals.
        draws: Random numbers; a draw takes one, unless the temperature is 0.

    Returns:
        The token and its logprob in the distribution drawn from; at temperature 0 its logprob
        at temperature 1.
    """
    values = logits.double()
    if params.temperature == 0:
        token = int(torch.nonzero(values == values.max())[0])
        return token, float(values[token] - values.logsumexp(0))
    # Relative to the largest, no temperature above 0 is too small to divide by.
    scaled = (values - values.max()) / params.temperature
    all_tokens = params.top_k <= 0 or params.top_k >= len(scaled)
    if all_tokens and params.top_p >= 1:
        return _draw_from(scaled, draws.next())
    # A stable sort keeps equals in the order of their ids.
    ordered, ids = scaled.sort(descending=True, stable=True)
    if not all_tokens:
        ordered = ordered[: params.top_k]
    if params.top_p < 1:
        reached = ordered.softmax(0).cumsum(0) >= params.top_p
        enough = int(reached.int().argmax()) + 1 if bool(reached.any()) else len(ordered)
        ordered = ordered[:enough]
    place, logprob = _draw_from(ordered, draws.next())
    return int(ids[place]), logprob


def _draw_from(scores: torch.Tensor, number: float) -> tuple[int, float]:
    """Draw by the inverse of the cumulative distribution at `number`."""
    logprobs = scores.log_softmax(0)
    cumulative = logprobs.exp().cumsum(0)
    # Rounding keeps the last sum from being exactly 1, so the number is scaled by it.
    wanted = torch.tensor([number * float(cumulative[-1])], dtype=torch.float64)
    place = min(int(torch.searchsorted(cumulative, wanted, right=True)), len(scores) - 1)
    while place > 0 and math.isinf(float(logprobs[place])):
        place -= 1  # rounding must not choose a token of no probability
    return place, float(logprobs[place])
