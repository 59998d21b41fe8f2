"""How far a trainer's logprobs are from those that the same tokens were sampled with.

Losses of reinforcement learning are given `logprobs`, the Sampler's. In the first call after the
weights went to the Sampler nothing but arithmetic lies between the two: ratios should be 1. Later
calls on the same tokens have the policy's own movement in it, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

BOUNDS_NATS = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0)


@dataclass
class Mismatch:
    """Sums over tokens.

    Attributes:
        tokens: By how far they are apart: up to each of `BOUNDS_NATS`, and those beyond.
        apart_nats: Sum of `|lp - q|`: `lp` the trainer's logprob of a token, `q` the Sampler's.
        kl_nats: Sum of `(lp - q)^2 / 2`, whose mean estimates KL(sampler || trainer) (k2 of
            Schulman, "Approximating KL Divergence", 2020).
    """

    tokens: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_NATS) + 1))
    apart_nats: float = 0.0
    kl_nats: float = 0.0

    def add(self, logprobs: np.ndarray, inputs: Mapping[str, np.ndarray]) -> None:
        """Take a datum in: its tokens with an advantage, since a prompt's have no such logprob.

        Args:
            logprobs: The trainer's, float32 `(N,)`; those that are not finite do not count.
            inputs: The `loss_fn_inputs`, with `logprobs` and `advantages`.
        """
        apart = np.abs(logprobs.astype(np.float64) - inputs["logprobs"])
        apart = apart[(inputs["advantages"] != 0) & np.isfinite(apart)]
        places = np.searchsorted(BOUNDS_NATS, apart)
        found = np.bincount(places, minlength=len(self.tokens)).tolist()
        self.include(Mismatch(found, float(apart.sum()), float(np.square(apart).sum() / 2)))

    def include(self, other: "Mismatch") -> None:
        """Add what somebody else counted."""
        self.tokens = [a + b for a, b in zip(self.tokens, other.tokens, strict=True)]
        self.apart_nats += other.apart_nats
        self.kl_nats += other.kl_nats
