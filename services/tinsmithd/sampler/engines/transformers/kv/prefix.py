"""Prompts that were read before."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from torch import Tensor


@dataclass
class Chunk:
    """KV of one chunk of a prompt.

    Attributes:
        kv_LHCD: Keys and values, `(layers, 2 * kv_heads, tokens, head_dim)`.
        last_hidden_d: `(d,)` of its last token, where a prompt ended there.
    """

    kv_LHCD: Tensor
    last_hidden_d: Tensor | None = None

    @property
    def bytes(self) -> int:
        """What it takes."""
        hidden = self.last_hidden_d.nbytes if self.last_hidden_d is not None else 0
        return self.kv_LHCD.nbytes + hidden


class PrefixCache:
    """Chunks by all that their KV depends on; those that were not used for longest go first.

    Prompts copy chunks, so that any chunk may go at any time.

    Args:
        bytes_max: Maximum bytes of all chunks; 0: it holds nothing.
    """

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.bytes = 0
        self._chunks: OrderedDict[bytes, Chunk] = OrderedDict()

    def get(self, digest: bytes) -> Chunk | None:
        """A chunk, which counts as used now."""
        chunk = self._chunks.get(digest)
        if chunk is not None:
            self._chunks.move_to_end(digest)
        return chunk

    def put(self, digest: bytes, chunk: Chunk) -> None:
        """Keep a chunk, in the place of one of the same name, as long as there is room."""
        self._drop(digest)
        if chunk.bytes > self.bytes_max:
            return
        self._chunks[digest] = chunk
        self.bytes += chunk.bytes
        while self.bytes > self.bytes_max:
            self._drop(next(iter(self._chunks)))

    def _drop(self, digest: bytes) -> None:
        chunk = self._chunks.pop(digest, None)
        if chunk is not None:
            self.bytes -= chunk.bytes


def chunk_digests(weights: str, tokens_P: np.ndarray, chunk_tokens: int) -> list[bytes]:
    """A name for each chunk of a prompt, which stands for the weights and all tokens up to its end.

    Args:
        weights: Key of the weights.
        tokens_P: The prompt, int64 `(P,)`.
        chunk_tokens: Tokens of each chunk but the last.
    """
    digest, found = blake2b(weights.encode()).digest(), []
    for start in range(0, len(tokens_P), chunk_tokens):
        tokens = np.ascontiguousarray(tokens_P[start : start + chunk_tokens], np.int64)
        digest = blake2b(digest + tokens.tobytes()).digest()
        found.append(digest)
    return found
