"""What a request holds of the KV cache: a reservation, its prompt, its sequences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tinsmithd.sampler.engines.transformers.kv.arenas import Holder


@dataclass(frozen=True)
class Reservation:
    """Room for a request's worst case. `KvCache.open_prompt` uses it up, or `cancel` gives it back.

    Attributes:
        prompt_tokens: Length of the prompt.
        new_tokens: Maximum tokens of each sample.
        samples: Number of sequences; 0 where only the prompt is scored.
        shared: Samples read the prompt's KV where it is, instead of a copy each. It depends on the
            request alone: several samples of a prompt of `SHARED_PROMPT_TOKENS_MIN` tokens or more.
        prompt_bytes: Held until the prompt is closed and, where it is shared, its last sequence.
        sequence_bytes: Held by each sequence.
    """

    prompt_tokens: int
    new_tokens: int
    samples: int
    shared: bool
    prompt_bytes: int
    sequence_bytes: int

    @property
    def total_bytes(self) -> int:
        """The whole room."""
        return self.prompt_bytes + self.samples * self.sequence_bytes


@dataclass(eq=False)
class Prompt:
    """A prompt on its way into the cache.

    Attributes:
        reservation: Its room.
        tokens_P: Its tokens, int64 `(P,)`.
        digests: Names of its chunks: what a chunk's KV depends on.
        cached_tokens_max: Maximum tokens to take from the prefix cache.
        kv_LHCD: Keys and values, `(layers, 2 * kv_heads, C, head_dim)`; zeros from `read` on. None:
            given back.
        read: Tokens whose KV is there; the prompt is ready to fork when this is P.
        cached: Those of them that came from the prefix cache.
        last_hidden_d: `(d,)` of the last token, when it came from the prefix cache with the rest.
            Otherwise the last row of the forward that reads the prompt's last piece is it.
        forked: Its sequences were made.
        closed: Nobody reads it or forks it any more.
        members: Open sequences that read its KV where it is.
    """

    reservation: Reservation
    tokens_P: np.ndarray
    digests: list[bytes]
    cached_tokens_max: int
    kv_LHCD: Tensor | None
    read: int = 0
    cached: int = 0
    last_hidden_d: Tensor | None = None
    forked: bool = False
    closed: bool = False
    members: int = 0


@dataclass(eq=False, kw_only=True)
class SequenceKv(Holder):
    """KV of one sample. In its slot is all of it, or what is behind a prompt that is shared.

    Attributes:
        prompt: What it continues.
    """

    prompt: Prompt

    @property
    def length(self) -> int:
        """Tokens whose KV is there, prompt included: the position of the next token."""
        return self.own + (len(self.prompt.tokens_P) if self.prompt.reservation.shared else 0)


@dataclass(frozen=True)
class KvStats:
    """Counters and gauges.

    Attributes:
        sequences: Open sequences.
        tokens: Tokens whose KV is held by open prompts and sequences.
        tokens_max: Tokens that `bytes_max` is enough for.
        reserved_bytes: Reserved by open requests.
        held_bytes: Allocated for prompts and sequences.
        prefix_bytes: Held by the prefix cache.
        prompt_tokens_cached: Tokens that came from the prefix cache, ever.
        prompt_tokens_computed: Prompt tokens that a forward read, ever.
    """

    sequences: int
    tokens: int
    tokens_max: int
    reserved_bytes: int
    held_bytes: int
    prefix_bytes: int
    prompt_tokens_cached: int
    prompt_tokens_computed: int
