"""The KV cache's attention against plain attention in float64, and its bits against each other."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from tinsmithd.sampler.engines.transformers.kv import KvCache, Prompt, SequenceKv
from tinsmithd.sampler.engines.transformers.kv.attention import attend, attend_plainly, causal_mask
from tinsmithd.sampler.engines.transformers.model.shape import ModelShape

DTYPES = [torch.float32, torch.bfloat16]
CHUNK_TOKENS = 128


def shape_of(
    dtype: torch.dtype = torch.float32,
    *,
    group: int = 3,
    head_dim: int = 64,
    windows: tuple[int | None, ...] = (None, None),
    context: int = 4096,
) -> ModelShape:
    return ModelShape(
        layers=len(windows),
        heads=2 * group,
        kv_heads=2,
        head_dim=head_dim,
        hidden=8,
        vocab=8,
        context=context,
        dtype=dtype,
        device=torch.device("cpu"),
        scaling=head_dim**-0.5,
        windows=windows,
    )


def cache_of(shape: ModelShape, *, bytes_max: int = 1 << 30, prefix_bytes_max: int = 0) -> KvCache:
    return KvCache(
        shape, bytes_max=bytes_max, prefix_bytes_max=prefix_bytes_max, chunk_tokens=CHUNK_TOKENS
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


@pytest.mark.parametrize(
    ("group", "head_dim", "windows"),
    [
        (3, 64, (None, None)),
        (1, 16, (None,)),
        (7, 32, (None,)),
        (4, 8, (40, None)),
        (2, 64, (16, 300)),
        (2, 64, (600,)),
    ],
)
def test_finds_what_plain_attention_finds(
    group: int, head_dim: int, windows: tuple[int | None, ...]
) -> None:
    """Prompts of one piece and of many, alone and in groups, over several sizes of slots."""
    shape = shape_of(group=group, head_dim=head_dim, windows=windows)
    cache = cache_of(shape)
    sizes = [(1, 5, 1), (100, 120, 1), (300, 100, 3), (257, 2, 2), (129, 1, 1), (640, 20, 1)]
    requests = [Request(cache, shape, seed, *size) for seed, size in enumerate(sizes, 1)]
    run(cache, shape, requests)
    for one in requests:
        assert_plain(one, 1e-5)


def test_finds_it_in_bfloat16() -> None:
    shape = shape_of(torch.bfloat16)
    cache = cache_of(shape)
    requests = [Request(cache, shape, 1, 300, 30, 3), Request(cache, shape, 2, 50, 30)]
    run(cache, shape, requests)
    for one in requests:
        assert_plain(one, 0.03)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "head_dim"), [(3, 64), (2, 8), (7, 128)])
def test_neighbours_change_no_bit(dtype: torch.dtype, group: int, head_dim: int) -> None:
    """Whoever joins and leaves beside a request, and whatever they make the kernel read."""
    shape = shape_of(dtype, group=group, head_dim=head_dim)
    sizes = [(3, 40, 1), (100, 150, 1), (190, 20, 1), (370, 30, 1), (500, 30, 2), (300, 25, 5)]
    alone = []
    for seed, size in enumerate(sizes, 1):
        cache = cache_of(shape)
        alone.append(Request(cache, shape, seed, *size))
        run(cache, shape, alone[-1:])
    cache = cache_of(shape)
    dice = np.random.default_rng(0)
    beside: list[Request] = []
    together: list[Request] = []
    for turn in range(400):
        if turn < 4 * len(sizes) and turn % 4 == 0:
            seed = turn // 4
            together.append(Request(cache, shape, seed + 1, *sizes[seed]))
        if dice.random() < 0.4 and len(beside) < 8:
            size = (int(dice.integers(1, 700)), int(dice.integers(1, 60)), int(dice.integers(1, 4)))
            beside.append(Request(cache, shape, 100 + turn, *size))
        if beside and dice.random() < 0.2:
            beside.pop(int(dice.integers(len(beside)))).close()
        if not step(cache, shape, [*together, *beside]) and turn > 4 * len(sizes):
            break
        if all(not one.open_sequences and one.sequences for one in together) and turn > 200:
            break
    for one, other in zip(alone, together, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_has_the_bits_of_a_prompts_token(dtype: torch.dtype) -> None:
    """A token made by decode finds what it finds when it is read as part of a prompt."""
    shape = shape_of(dtype)
    cache = cache_of(shape)
    one = Request(cache, shape, 1, 150, 620)
    run(cache, shape, [one])
    made = torch.cat([one.prompt_stream, one.streams[0][:, :619]], dim=1)
    read = Request(cache, shape, 2, made.shape[1], 1)
    read.prompt_stream = made
    run(cache, shape, [read])
    found = torch.cat(read.prompt_found, dim=1)
    assert torch.equal(found[:, :150], torch.cat(one.prompt_found, dim=1))
    assert torch.equal(found[:, 150:], torch.stack(one.found[0], dim=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 300, 512])
def test_a_cached_prompt_changes_no_bit(dtype: torch.dtype, tokens: int) -> None:
    shape = shape_of(dtype)
    cache = cache_of(shape, prefix_bytes_max=1 << 28)
    one, other = (Request(cache, shape, 1, tokens, 10, 2) for _time in range(2))
    run(cache, shape, [one])
    assert cache.next_piece(other.prompt) is None
    assert other.prompt.read == other.prompt.cached == tokens
    assert other.prompt.last_hidden_d is not None
    assert torch.equal(other.prompt.last_hidden_d, torch.full((8,), 1.0))
    run(cache, shape, [other])
    assert not other.prompt_found
    assert_same(one, other)
    assert cache.stats.prompt_tokens_computed == tokens
    assert cache.stats.prompt_tokens_cached == tokens


def test_a_longer_prompt_takes_the_whole_chunks_of_a_shorter_one() -> None:
    shape = shape_of(torch.bfloat16)
    cache = cache_of(shape, prefix_bytes_max=1 << 28)
    plain_cache = cache_of(shape)
    long = Request(plain_cache, shape, 1, 400, 5)
    run(plain_cache, shape, [long])
    short = Request(cache, shape, 1, 256, 1)
    short.prompt_stream = long.prompt_stream[:, :256]
    short.prompt.tokens_P[:] = long.prompt.tokens_P[:256]
    assert np.array_equal(short.prompt.tokens_P, long.prompt.tokens_P[:256])
    run(cache, shape, [short])
    again = Request(cache, shape, 1, 400, 5)
    assert again.prompt.cached == 256
    run(cache, shape, [again])
    rest = torch.cat(again.prompt_found, dim=1)
    assert torch.equal(rest, torch.cat(long.prompt_found, dim=1)[:, 256:])
    assert all(map(torch.equal, long.found[0], again.found[0]))


def test_prompts_that_are_read_at_once_are_read_once() -> None:
    shape = shape_of(torch.bfloat16)
    cache = cache_of(shape, prefix_bytes_max=1 << 28)
    requests = [Request(cache, shape, 1, 300, 5) for _request in range(4)]
    requests[0].close()
    run(cache, shape, requests[1:])
    assert cache.stats.prompt_tokens_computed == 300
    assert_same(requests[1], requests[2])
    assert_same(requests[1], requests[3])


def test_who_is_closed_leaves_its_piece_to_the_next() -> None:
    shape = shape_of()
    cache = cache_of(shape, prefix_bytes_max=1 << 28)
    one, other = (Request(cache, shape, 1, 20, 2) for _request in range(2))
    assert cache.next_piece(one.prompt) == (0, 20)
    assert cache.next_piece(other.prompt) is None
    one.close()
    assert cache.next_piece(other.prompt) == (0, 20)


def test_the_prefix_cache_knows_weights_tokens_and_its_bound() -> None:
    shape = shape_of()
    chunk_bytes = 2 * shape.layers * shape.kv_heads * CHUNK_TOKENS * shape.head_dim * 4
    cache = cache_of(shape, prefix_bytes_max=3 * chunk_bytes + 100)
    tokens = np.arange(CHUNK_TOKENS)
    for seed in range(5):
        one = Request(cache, shape, seed + 1, CHUNK_TOKENS, 2)
        run(cache, shape, [one])
        assert cache.stats.prefix_bytes <= 3 * chunk_bytes + 100
    reservation = cache.reserve(CHUNK_TOKENS, 1, 1)
    assert reservation is not None
    latest = Request(cache, shape, 5, CHUNK_TOKENS, 2)
    assert latest.prompt.cached == CHUNK_TOKENS
    assert Request(cache, shape, 1, CHUNK_TOKENS, 2).prompt.cached == 0
    known = latest.prompt.tokens_P
    assert cache.open_prompt(reservation, "other weights", known).cached == 0
    reservation = cache.reserve(CHUNK_TOKENS, 1, 1)
    assert reservation is not None
    assert cache.open_prompt(reservation, "weights", tokens).cached == 0


def test_a_caller_says_from_where_it_wants_hidden_states() -> None:
    shape = shape_of()
    cache = cache_of(shape, prefix_bytes_max=1 << 28)
    one = Request(cache, shape, 1, 300, 2)
    run(cache, shape, [one])
    for most, cached in ((0, 0), (127, 0), (128, 128), (299, 256), (300, 300)):
        reservation = cache.reserve(300, 0, 0)
        assert reservation is not None
        prompt = cache.open_prompt(
            reservation, "weights", one.prompt.tokens_P, cached_tokens_max=most
        )
        assert prompt.cached == cached
        cache.close_prompt(prompt)


def test_all_room_comes_back() -> None:
    """At any moment within the bound, and at the end nothing is held."""
    shape = shape_of(context=1024)
    token_bytes = 2 * shape.layers * shape.kv_heads * shape.head_dim * 4
    bytes_max = 9000 * token_bytes
    cache = cache_of(shape, bytes_max=bytes_max)
    dice = np.random.default_rng(3)
    requests: list[Request] = []
    refused = 0
    for turn in range(250):
        size = (int(dice.integers(1, 600)), int(dice.integers(1, 400)), int(dice.integers(1, 5)))
        reservation = cache.reserve(*size)
        if reservation is None:
            refused += 1
        else:
            cache.cancel(reservation)
            requests.append(Request(cache, shape, turn + 1, *size))
        if requests and dice.random() < 0.3:
            requests.pop(int(dice.integers(len(requests)))).close()
        step(cache, shape, requests)
        requests = [one for one in requests if one.open_sequences or not one.sequences]
        stats = cache.stats
        assert stats.held_bytes <= bytes_max
        assert stats.reserved_bytes <= bytes_max
        assert stats.tokens * token_bytes <= stats.held_bytes
    assert refused > 20
    for one in requests:
        one.close()
        one.close()
    stats = cache.stats
    assert (stats.sequences, stats.tokens, stats.reserved_bytes, stats.held_bytes) == (0, 0, 0, 0)


def test_room_is_for_the_worst_case() -> None:
    shape = shape_of(context=1024)
    token_bytes = 2 * shape.layers * shape.kv_heads * shape.head_dim * 4
    cache = cache_of(shape, bytes_max=2048 * token_bytes)
    assert cache.fits_ever(1000, 24, 1)
    assert not cache.fits_ever(1000, 24, 2) or cache.fits_ever(1000, 24, 3)
    assert not cache.fits_ever(200, 824, 2)
    first = cache.reserve(1000, 24, 1)
    assert first is not None
    assert cache.reserve(1, 1, 1) is None
    cache.cancel(first)
    assert cache.reserve(1, 1, 1) is not None


def test_a_sequence_that_went_wrong_leaves_nothing_behind() -> None:
    """NaN in its keys and values reaches neither its neighbours nor who has its slot next."""
    shape = shape_of()
    cache = cache_of(shape)
    wrong, right = Request(cache, shape, 1, 100, 60), Request(cache, shape, 2, 3, 80)
    wrong.streams[0].fill_(torch.nan)
    step(cache, shape, [wrong, right])
    owners = [wrong, right]
    for _step in range(20):
        found = cache.batch([one.sequences[0] for one in owners], [])
        rows = torch.cat([owners[s is right.sequences[0]].rows(s) for s in found.sequences], dim=1)
        for layer, qkv in enumerate(rows):
            out = found(layer, qkv[:, :6], qkv[:, 6:8], qkv[:, 8:])
            assert out[found.sequences.index(right.sequences[0])].isfinite().all()
        found.commit()
    wrong.close()
    after = Request(cache, shape, 3, 5, 90)
    right.close()
    run(cache, shape, [after])
    assert_plain(after, 1e-5)


def test_a_step_that_was_not_committed_has_not_been() -> None:
    shape = shape_of(torch.bfloat16)
    runs = []
    for broken in (False, True):
        cache = cache_of(shape)
        requests = [Request(cache, shape, 1, 300, 20, 3), Request(cache, shape, 2, 190, 20)]
        while any(not one.sequences or one.open_sequences for one in requests):
            if broken:
                step(cache, shape, requests, commit=False)
            step(cache, shape, requests)
        runs.append(requests)
    for one, other in zip(*runs, strict=True):
        assert_same(one, other)


def test_some_of_the_sequences_may_wait() -> None:
    """A step over any subset, in any order."""
    shape = shape_of()
    cache = cache_of(shape)
    requests = [Request(cache, shape, seed, 20 * seed, 30) for seed in range(1, 9)]
    group = Request(cache, shape, 20, 300, 30, 6)
    step(cache, shape, [*requests, group])
    while group.prompt.read < 300:
        step(cache, shape, [group])
    dice = np.random.default_rng(1)
    for _step in range(12):
        some = [requests[i] for i in dice.permutation(8)[:4]]
        step(cache, shape, some)
        chosen = [group.sequences[i] for i in dice.permutation(6)[:3]]
        found = cache.batch(chosen, [])
        rows = torch.cat([group.rows(s) for s in found.sequences], dim=1)
        out = [found(i, qkv[:, :6], qkv[:, 6:8], qkv[:, 8:]) for i, qkv in enumerate(rows)]
        found.commit()
        for row, sequence in enumerate(found.sequences):
            group.found[group.sequences.index(sequence)].append(torch.stack(out)[:, row])
    for one in [*requests, group]:
        assert_plain(one, 1e-5)


def test_hostile_numbers() -> None:
    """Prompts of one token and of the whole context, one new token, and 256 samples."""
    shape = shape_of(torch.bfloat16, context=600)
    cache = cache_of(shape)
    sizes = [(1, 1, 256), (600, 0, 0), (599, 1, 256), (300, 3, 256), (1, 3, 256), (1, 599, 1)]
    requests = [Request(cache, shape, seed, *size) for seed, size in enumerate(sizes, 1)]
    while step(cache, shape, requests):
        pass
    for one in requests:
        assert all(len(found) == max(0, one.new - 1) for found in one.found)
        one.close()
    assert cache.stats.held_bytes == cache.stats.reserved_bytes == 0


def test_devices_without_the_kernel_find_the_same() -> None:
    dice = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((2, 3, count, 16), generator=dice) for count in (8, 96, 96))
    mask = causal_mask(torch.arange(80, 88), 0, 96, 30, torch.float32).expand(2, 3, -1, -1)
    for one, other in zip(
        attend(q, k, v, mask, 0.25), attend_plainly(q, k, v, mask, 0.25), strict=True
    ):
        torch.testing.assert_close(one, other)
