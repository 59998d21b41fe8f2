"""Requests of a model that is random numbers, for tests of the KV cache."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tinsmithd.sampler.engines.transformers.kv import KvCache, Prompt, SequenceKv
from tinsmithd.sampler.engines.transformers.model.shape import ModelShape

DTYPES = [torch.float32, torch.bfloat16]
CHUNK_TOKENS = 128


def shape_of(
    dtype: torch.dtype = torch.float32,
    *,
    group: int = 3,
    kv_heads: int = 2,
    head_dim: int = 64,
    windows: tuple[int | None, ...] = (None, None),
    context: int = 4096,
) -> ModelShape:
    return ModelShape(
        layers=len(windows),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden=8,
        vocab=8,
        context=context,
        dtype=dtype,
        device=torch.device("cpu"),
        scaling=head_dim**-0.5,
        windows=windows,
    )


def cache_of(
    shape: ModelShape,
    *,
    bytes_max: int = 1 << 30,
    prefix_bytes_max: int = 0,
    chunk_tokens: int = CHUNK_TOKENS,
    piece_tokens: int | None = None,
) -> KvCache:
    return KvCache(
        shape,
        bytes_max=bytes_max,
        prefix_bytes_max=prefix_bytes_max,
        chunk_tokens=chunk_tokens,
        piece_tokens=piece_tokens,
    )


def stream(shape: ModelShape, seed: int, tokens: int) -> Tensor:
    """q, k and v of some tokens in all layers, `(layers, tokens, heads + 2 * kv_heads, D)`."""
    dice = torch.Generator().manual_seed(seed)
    heads = shape.heads + 2 * shape.kv_heads
    made = torch.randn((shape.layers, tokens, heads, shape.head_dim), generator=dice)
    return (1.5 * made).to(shape.dtype)


class Request:
    """A request whose model is random numbers; it keeps what attention found for each token."""

    def __init__(
        self, cache: KvCache, shape: ModelShape, seed: int, prompt: int, new: int, samples: int = 1
    ) -> None:
        self.cache, self.shape, self.seed, self.new = cache, shape, seed, new
        reservation = cache.reserve(prompt, new, samples)
        assert reservation is not None
        tokens = np.random.default_rng(seed).integers(0, 1000, prompt)
        self.prompt: Prompt = cache.open_prompt(reservation, "weights", tokens)
        self.prompt_stream = stream(shape, seed, prompt)
        self.streams = [stream(shape, 1000 * seed + i + 1, new) for i in range(samples)]
        self.prompt_found: list[Tensor] = []
        self.found: list[list[Tensor]] = [[] for _stream in self.streams]
        self.sequences: list[SequenceKv] = []

    def rows(self, sequence: SequenceKv) -> Tensor:
        """The next token of a sequence, `(layers, 1, ...)`."""
        index = self.sequences.index(sequence)
        step = len(self.found[index])
        return self.streams[index][:, step : step + 1]

    @property
    def open_sequences(self) -> list[SequenceKv]:
        return [sequence for sequence in self.sequences if not sequence.closed]

    def go_on(self) -> None:
        """Fork when the prompt is read; close sequences that are done."""
        if self.prompt.read == len(self.prompt.tokens_P) and not self.prompt.forked:
            if self.prompt.last_hidden_d is None:
                self.cache.finish(self.prompt, torch.full((8,), float(self.seed)))
            self.sequences = self.cache.fork(self.prompt)
            self.cache.close_prompt(self.prompt)
        for sequence, found in zip(self.sequences, self.found, strict=False):
            if len(found) == self.new - 1:
                self.cache.close_sequence(sequence)

    def close(self) -> None:
        self.cache.close_prompt(self.prompt)
        for sequence in self.sequences:
            self.cache.close_sequence(sequence)


def step(
    cache: KvCache, shape: ModelShape, requests: Sequence[Request], commit: bool = True
) -> int:
    """One forward of all that the requests want next; returns the rows."""
    reading = {one.prompt: one for one in requests if not one.prompt.closed}
    pieces = [(prompt, piece) for prompt in reading if (piece := cache.next_piece(prompt))]
    for one in requests:
        one.go_on()
    owner = {sequence: one for one in requests for sequence in one.open_sequences}
    found = cache.batch(list(owner), [(prompt, *piece) for prompt, piece in pieces])
    rows = [owner[sequence].rows(sequence) for sequence in found.sequences]
    rows += [reading[p].prompt_stream[:, start:end] for p, start, end in found.pieces]
    if not rows:
        return 0
    stacked = torch.cat(rows, dim=1)
    positions = [sequence.length for sequence in found.sequences]
    positions += [i for _prompt, start, end in found.pieces for i in range(start, end)]
    assert found.positions_T.tolist() == positions
    heads, kv_heads = shape.heads, shape.kv_heads
    with torch.inference_mode():
        out = torch.stack(
            [
                found(layer, qkv[:, :heads], qkv[:, heads:-kv_heads], qkv[:, -kv_heads:])
                for layer, qkv in enumerate(stacked)
            ]
        )
    assert not out.isnan().any()
    if commit:
        found.commit()
        for row, sequence in enumerate(found.sequences):
            one = owner[sequence]
            one.found[one.sequences.index(sequence)].append(out[:, row])
        row = len(found.sequences)
        for prompt, start, end in found.pieces:
            reading[prompt].prompt_found.append(out[:, row : row + end - start])
            row += end - start
        for one in requests:
            one.go_on()
    return len(out[0])


def run(cache: KvCache, shape: ModelShape, requests: Sequence[Request]) -> None:
    while step(cache, shape, requests):
        pass
    assert all(len(found) == one.new - 1 for one in requests for found in one.found)


def plain(shape: ModelShape, tokens: Tensor) -> Tensor:
    """Causal attention in float64 over `(layers, T, heads + 2 * kv_heads, D)`."""
    found, count = [], tokens.shape[1]
    for layer, qkv in enumerate(tokens.double()):
        q, k, v = qkv.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
        k, v = (tensor.repeat_interleave(shape.group, dim=1) for tensor in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * shape.scaling
        rows, columns = torch.arange(count)[:, None], torch.arange(count)
        window = shape.windows[layer] or count
        scores.masked_fill_((columns > rows) | (columns <= rows - window), -torch.inf)
        found.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1))
    return torch.stack(found)


def assert_plain(one: Request, tolerance: float) -> None:
    """All that a request found is what plain attention finds."""
    for made, found in zip(one.streams, one.found, strict=True):
        tokens = torch.cat([one.prompt_stream, made[:, : len(found)]], dim=1)
        expected = plain(one.shape, tokens)
        count = one.prompt_stream.shape[1]
        if one.prompt_found:
            prompt = torch.cat(one.prompt_found, dim=1).double()
            torch.testing.assert_close(
                prompt, expected[:, count - prompt.shape[1] : count], atol=tolerance, rtol=tolerance
            )
        if found:
            torch.testing.assert_close(
                torch.stack(found, dim=1).double(),
                expected[:, count:],
                atol=tolerance,
                rtol=tolerance,
            )


def assert_same(one: Request, other: Request) -> None:
    """Bit equality of all that two runs of a request found."""
    for found, again in zip(one.found, other.found, strict=True):
        assert len(found) == len(again)
        assert all(map(torch.equal, found, again))
    if one.prompt_found and other.prompt_found:
        assert torch.equal(torch.cat(one.prompt_found, 1), torch.cat(other.prompt_found, 1))
