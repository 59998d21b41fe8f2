"""The KV cache: rooms of requests, and attention of one step. One thread uses it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from tinsmithd.sampler.engines.transformers.kv.parts import (
    KvStats,
    Prompt,
    Reservation,
    SequenceKv,
)
from tinsmithd.sampler.engines.transformers.kv.step import StepAttention
from tinsmithd.sampler.engines.transformers.model.shape import ModelShape


class KvCache:
    """Keys and values of prompts and sequences, and the prefix cache.

    How a request goes::

        reservation = cache.reserve(len(tokens), max_tokens, num_samples)   # None: wait
        prompt = cache.open_prompt(reservation, weights_key, tokens)
        # each step, until prompt.read == len(tokens):
        piece = cache.next_piece(prompt)       # (start, end); may find more in the prefix cache
        step = cache.batch(decode, [(prompt, *piece), ...])
        # tokens of step.sequences (in that order), then of step.pieces (in that order)
        hidden_TD = decoder.forward(tokens_T, step.positions_T, step, loras)
        step.commit()
        cache.finish(prompt, last_hidden_d)    # those whose last piece this was
        sequences = cache.fork(prompt)
        cache.close_prompt(prompt)             # at once or later; a shared one's KV stays
        ...
        cache.close_sequence(sequence)         # each, at any time between two steps

    Args:
        shape: Of the model.
        bytes_max: Maximum bytes of prompts and sequences together.
        prefix_bytes_max: Maximum bytes of the prefix cache, beside them; 0 switches it off.
        chunk_tokens: Prompts are read in pieces that begin at multiples of this.
    """

    def __init__(
        self, shape: ModelShape, *, bytes_max: int, prefix_bytes_max: int, chunk_tokens: int
    ) -> None: ...

    @property
    def stats(self) -> KvStats:
        """What it holds."""

    @property
    def invariant(self) -> bool:
        """True when a sequence's bits do not depend on its neighbours (CPU: always)."""

    def fits_ever(self, prompt_tokens: int, new_tokens: int, samples: int) -> bool:
        """Whether `reserve` would give room when nobody else has any."""

    def reserve(self, prompt_tokens: int, new_tokens: int, samples: int) -> Reservation | None:
        """Room for the worst case, so that nothing that has begun ever lacks it. None: wait."""

    def cancel(self, reservation: Reservation) -> None:
        """Give back a reservation that was not opened."""

    def open_prompt(
        self,
        reservation: Reservation,
        weights: str,
        tokens_P: np.ndarray,
        *,
        cached_tokens_max: int | None = None,
    ) -> Prompt:
        """Begin to read a prompt; what the prefix cache has of it is there at once.

        Args:
            reservation: Its room, of as many prompt tokens.
            weights: Key of the weights; the same key means the same weights for ever.
            tokens_P: The prompt, int64 `(P,)`, at least one.
            cached_tokens_max: Take no more than this many tokens from the prefix cache: a caller
                that wants the hidden states from position n on says n. None: all.
        """

    def next_piece(self, prompt: Prompt) -> tuple[int, int] | None:
        """What to read next: positions `[start, end)`.

        It looks into the prefix cache again first, so `prompt.read` may have grown, up to P.

        Returns:
            None when all is read, or when another open prompt is about to read the same tokens:
            ask again next step. Who was given a piece must read it, or be closed.
        """

    def batch(
        self, decode: Sequence[SequenceKv], pieces: Sequence[tuple[Prompt, int, int]]
    ) -> StepAttention:
        """Attention of one forward: one row per sequence, then the rows of the pieces.

        Rows of sequences stand in the order of `StepAttention.sequences`, not of `decode`.
        It is cheapest to decode all open sequences in each step.
        """

    def finish(self, prompt: Prompt, last_hidden_d: Tensor) -> None:
        """Put a prompt that was read into the prefix cache, with `(d,)` of its last token."""

    def fork(self, prompt: Prompt) -> list[SequenceKv]:
        """`reservation.samples` sequences that continue a prompt that is read; once."""

    def close_prompt(self, prompt: Prompt) -> None:
        """Give back a prompt's room, at any time; its sequences go on. Twice is no error."""

    def close_sequence(self, sequence: SequenceKv) -> None:
        """Give back a sequence's room. Twice is no error."""
