"""The KV cache: rooms of requests, and attention of one step. One thread uses it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from tinsmithd.sampler.engines.transformers.kv.arenas import zeros
from tinsmithd.sampler.engines.transformers.kv.attention import ROWS, probe
from tinsmithd.sampler.engines.transformers.kv.parts import (
    KvStats,
    Prompt,
    Reservation,
    SequenceKv,
)
from tinsmithd.sampler.engines.transformers.kv.prefix import Chunk, PrefixCache, chunk_digests
from tinsmithd.sampler.engines.transformers.kv.rooms import Rooms
from tinsmithd.sampler.engines.transformers.kv.rows import Kernel
from tinsmithd.sampler.engines.transformers.kv.step import StepAttention
from tinsmithd.sampler.engines.transformers.model.shape import ModelShape

SHARED_PROMPT_TOKENS_MIN = 256
"""Shorter prompts are copied to each sample's slot instead of being kept once for the group."""


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
        chunk_tokens: The prefix cache keeps prompts in chunks that begin at multiples of this.
        piece_tokens: Maximum tokens that are read at once, a multiple of that; None: a chunk. Where
            a row's bits may depend on how many there are, all chunks are as long as pieces, so that
            what is read depends on the prompt alone.
    """

    def __init__(
        self,
        shape: ModelShape,
        *,
        bytes_max: int,
        prefix_bytes_max: int,
        chunk_tokens: int,
        piece_tokens: int | None = None,
    ) -> None:
        self._shape = shape
        self._piece_tokens = piece_tokens or chunk_tokens
        assert self._piece_tokens % chunk_tokens == 0
        rows = -(-shape.group // ROWS) * ROWS
        counts, same = probe(shape.dtype, shape.device, shape.head_dim, rows, shape.scaling)
        self._chunk_tokens = chunk_tokens if same else self._piece_tokens
        self._kernel = Kernel(shape, counts, same)
        self._rooms = Rooms(shape, counts, bytes_max)
        self._prefix = PrefixCache(prefix_bytes_max)
        self._readers: dict[bytes, Prompt] = {}
        """Who is about to read a chunk that others may want, too."""
        self._tokens_cached = self._tokens_computed = 0

    def forget_all(self) -> None:
        """Drop all that it holds, in whatever state; nobody uses what it gave out any more."""
        self._rooms = Rooms(self._shape, self._kernel.counts, self._rooms.bytes_max)
        self._prefix = PrefixCache(self._prefix.bytes_max)
        self._readers = {}

    @property
    def invariant(self) -> bool:
        """Whether a sequence's bits are known not to depend on its neighbours."""
        return self._shape.device.type == "cpu"

    @property
    def stats(self) -> KvStats:
        """What it holds."""
        rooms = self._rooms
        return KvStats(
            sequences=rooms.sequences,
            tokens=rooms.tokens,
            tokens_max=rooms.bytes_max // rooms.token_bytes,
            reserved_bytes=rooms.reserved_bytes,
            held_bytes=rooms.held_bytes,
            prefix_bytes=self._prefix.bytes,
            prompt_tokens_cached=self._tokens_cached,
            prompt_tokens_computed=self._tokens_computed,
        )

    def fits_ever(self, prompt_tokens: int, new_tokens: int, samples: int) -> bool:
        """Whether `reserve` would give room when nobody else has any."""
        room = self._room(prompt_tokens, new_tokens, samples)
        return room.total_bytes <= self._rooms.bytes_max

    def reserve(self, prompt_tokens: int, new_tokens: int, samples: int) -> Reservation | None:
        """Room for the worst case, so that nothing that has begun ever lacks it. None: wait."""
        room = self._room(prompt_tokens, new_tokens, samples)
        return room if self._rooms.reserve(room.total_bytes) else None

    def cancel(self, reservation: Reservation) -> None:
        """Give back a reservation that was not opened."""
        self._rooms.give_back(reservation.total_bytes)

    def _room(self, prompt_tokens: int, new_tokens: int, samples: int) -> Reservation:
        assert prompt_tokens >= 1
        narrow = any(window is not None for window in self._shape.windows)
        shared = samples > 1 and prompt_tokens >= SHARED_PROMPT_TOKENS_MIN and not narrow
        longest = new_tokens if shared else prompt_tokens + new_tokens
        return Reservation(
            prompt_tokens,
            new_tokens,
            samples,
            shared,
            prompt_bytes=self._rooms.prompt_bytes(prompt_tokens),
            sequence_bytes=self._rooms.sequence_bytes(longest),
        )

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
        assert len(tokens_P) == reservation.prompt_tokens
        shape = self._shape
        tokens = self._kernel.counts.padded(len(tokens_P))
        kv = (shape.layers, 2 * shape.kv_heads, tokens, shape.head_dim)
        self._rooms.free(reservation.prompt_bytes)
        prompt = Prompt(
            reservation,
            tokens_P,
            chunk_digests(weights, tokens_P, self._chunk_tokens),
            len(tokens_P) if cached_tokens_max is None else cached_tokens_max,
            zeros(kv, shape),
        )
        self._rooms.prompts.add(prompt)
        self._take_cached(prompt)
        return prompt

    def next_piece(self, prompt: Prompt) -> tuple[int, int] | None:
        """What to read next: positions `[start, end)`.

        It looks into the prefix cache again first, so `prompt.read` may have grown, up to P.

        Returns:
            None when all is read, or when another open prompt is about to read the same tokens:
            ask again next step. Who was given a piece must read it, or be closed.
        """
        self._take_cached(prompt)
        start = end = prompt.read
        last = min(len(prompt.tokens_P), start + self._piece_tokens)
        while end < last and self._claims(prompt, end, self._chunk_end(prompt, end)):
            end = self._chunk_end(prompt, end)
        return (start, end) if end > start else None

    def _claims(self, prompt: Prompt, start: int, end: int) -> bool:
        """Whether a prompt reads a chunk itself; others that want it wait for it then."""
        if end > prompt.cached_tokens_max or not self._would_keep(end - start):
            return True
        digest = prompt.digests[start // self._chunk_tokens]
        return self._readers.setdefault(digest, prompt) is prompt

    def batch(
        self, decode: Sequence[SequenceKv], pieces: Sequence[tuple[Prompt, int, int]]
    ) -> StepAttention:
        """Attention of one forward: one row per sequence, then the rows of the pieces.

        Rows of sequences stand in the order of `StepAttention.sequences`, not of `decode`.
        It is cheapest to decode all open sequences in each step.
        """
        assert all(not sequence.closed for sequence in decode)
        assert all(prompt.read == start for prompt, start, _end in pieces)
        rows = self._rooms.arrange(decode)
        return StepAttention(self._kernel, rows, pieces, self._committed)

    def finish(self, prompt: Prompt, last_hidden_d: Tensor) -> None:
        """Put a prompt that was read into the prefix cache, with `(d,)` of its last token."""
        count = len(prompt.tokens_P)
        assert prompt.read == count
        start = (count - 1) // self._chunk_tokens * self._chunk_tokens
        self._keep(prompt, start, count, last_hidden_d.clone())
        self._forget_reader(prompt)

    def fork(self, prompt: Prompt) -> list[SequenceKv]:
        """`reservation.samples` sequences that continue a prompt that is read; once."""
        assert prompt.read == len(prompt.tokens_P)
        assert not prompt.forked
        assert not prompt.closed
        prompt.forked = True
        return self._rooms.fork(prompt)

    def close_prompt(self, prompt: Prompt) -> None:
        """Give back a prompt's room, at any time; its sequences go on. Twice is no error."""
        self._forget_reader(prompt)
        self._rooms.close_prompt(prompt)

    def close_sequence(self, sequence: SequenceKv) -> None:
        """Give back a sequence's room. Twice is no error."""
        self._rooms.close_sequence(sequence)

    def _committed(self, step: StepAttention) -> None:
        for prompt, start, end in step.pieces:
            self._tokens_computed += end - start
            while start < end and (chunk_end := self._chunk_end(prompt, start)) <= end:
                if chunk_end < len(prompt.tokens_P):  # `finish` keeps the last one
                    self._keep(prompt, start, chunk_end, None)
                start = chunk_end
            if end < len(prompt.tokens_P):
                self._forget_reader(prompt)

    def _keep(self, prompt: Prompt, start: int, end: int, last_hidden_d: Tensor | None) -> None:
        """Put a chunk that was read into the prefix cache."""
        if not self._would_keep(end - start) or prompt.closed:
            return
        assert prompt.kv_LHCD is not None
        digest = prompt.digests[start // self._chunk_tokens]
        known = self._prefix.get(digest)
        adds = last_hidden_d is not None and known is not None and known.last_hidden_d is None
        if known is None or adds:
            self._prefix.put(digest, Chunk(prompt.kv_LHCD[:, :, start:end].clone(), last_hidden_d))

    def _take_cached(self, prompt: Prompt) -> None:
        """Copy from the prefix cache what comes next, as far as it goes."""
        while (start := prompt.read) < (end := self._chunk_end(prompt, prompt.read)):
            chunk = self._prefix.get(prompt.digests[start // self._chunk_tokens])
            whole = end == len(prompt.tokens_P)
            if chunk is None or end > prompt.cached_tokens_max:
                return
            if whole and chunk.last_hidden_d is None:
                return
            assert prompt.kv_LHCD is not None
            prompt.kv_LHCD[:, :, start:end] = chunk.kv_LHCD
            if whole:
                prompt.last_hidden_d = chunk.last_hidden_d
            prompt.read = end
            prompt.cached += end - start
            self._tokens_cached += end - start

    def _chunk_end(self, prompt: Prompt, start: int) -> int:
        """Where the chunk ends that begins at `start`; where the prompt does, behind the last."""
        return min(len(prompt.tokens_P), (start // self._chunk_tokens + 1) * self._chunk_tokens)

    def _would_keep(self, tokens: int) -> bool:
        """Whether the prefix cache is large enough for a chunk."""
        return tokens * self._rooms.token_bytes <= self._prefix.bytes_max

    def _forget_reader(self, prompt: Prompt) -> None:
        """Let others read what this prompt was about to."""
        for digest in prompt.digests:
            if self._readers.get(digest) is prompt:
                del self._readers[digest]
