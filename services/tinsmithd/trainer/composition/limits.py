"""What memory turned out to hold: what did not fit once is not tried again."""

import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

from tinsmithd.trainer.composition.rounds import MicroBatch, Round


@dataclass
class _Limit:
    tokens_max: int = sys.maxsize
    plain_tokens_max: int = sys.maxsize


class FoundLimits:
    """Limits that were found out by running out of memory, by kind of computation.

    All ranks learn the same, since they know how each of them executed a round.
    """

    def __init__(self) -> None:
        self._found: dict[Hashable, _Limit] = {}

    def apply(
        self, kind: Hashable, tokens_max: int, plain_tokens_max: int | None
    ) -> tuple[int, int | None]:
        """Limits of `compose`, no larger than what was found.

        Args:
            kind: Of the computation: what a token keeps depends on it.
            tokens_max: As settings have it.
            plain_tokens_max: As it was estimated; None without a backward pass.
        """
        found = self._found.get(kind)
        if found is None:
            return tokens_max, plain_tokens_max
        plain = None if plain_tokens_max is None else min(plain_tokens_max, found.plain_tokens_max)
        return min(tokens_max, found.tokens_max), plain

    def tokens_max(self, kind: Hashable) -> int:
        """Most tokens that were found to fit; the largest number where none were not."""
        found = self._found.get(kind)
        return sys.maxsize if found is None else found.tokens_max

    def learn(
        self,
        kind: Hashable,
        tokens_of: Callable[[MicroBatch], int],
        composed: Sequence[Round],
        executed: Sequence[Round],
    ) -> None:
        """Remember what was split, and what had to be recomputed.

        Args:
            kind: See `apply`.
            tokens_of: Number of tokens that a micro-batch of this call computes.
            composed: What was to be executed.
            executed: What was.
        """
        for before, pieces in _changed(composed, executed):
            limit = self._found.setdefault(kind, _Limit())
            tokens = [tokens_of(piece) for piece in pieces]
            if len(pieces) > 1:
                limit.tokens_max = min(limit.tokens_max, max(tokens))
            alone = [n for n, piece in zip(tokens, pieces, strict=True) if piece.recompute]
            if alone and not before.recompute:
                limit.plain_tokens_max = min(limit.plain_tokens_max, min(alone) - 1)

    def forget(self) -> None:
        """There is more memory than before."""
        self._found.clear()


def _changed(
    composed: Sequence[Round], executed: Sequence[Round]
) -> Iterator[tuple[MicroBatch, list[MicroBatch]]]:
    """Micro-batches that were executed in another way, and how."""
    for before, after in zip(composed, executed, strict=True):
        for planned, done in zip(before, after, strict=True):
            rest = iter(done)
            for micro_batch in planned:
                pieces: list[MicroBatch] = []
                while sum(len(piece.indices) for piece in pieces) < len(micro_batch.indices):
                    pieces.append(next(rest))
                if pieces != [micro_batch]:
                    yield micro_batch, pieces
