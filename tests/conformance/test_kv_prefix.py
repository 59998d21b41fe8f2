"""Prompts that were read before change no bit, and cost nothing."""

import numpy as np
import pytest
import torch

from kv_requests import (
    CHUNK_TOKENS,
    DTYPES,
    Request,
    assert_same,
    cache_of,
    run,
    shape_of,
)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pieces_of_many_chunks_change_no_bit_wherever_they_begin(dtype: torch.dtype) -> None:
    """A prompt of which more and more is cached has the bits of one that was read in short pieces;
    what is new is computed, to the chunk."""
    shape = shape_of(dtype)
    short, count = cache_of(shape, chunk_tokens=32), 900
    expected = Request(short, shape, 1, count, 5)
    run(short, shape, [expected])
    whole = torch.cat(expected.prompt_found, dim=1)
    cache = cache_of(shape, prefix_bytes_max=1 << 28, chunk_tokens=32, piece_tokens=256)
    if not cache._kernel.same:
        pytest.skip("here a row's bits may depend on the piece")
    computed = cached = 0
    for tokens in (100, 130, 400, 900):
        one = Request(cache, shape, 1, tokens, 5)
        one.prompt_stream = expected.prompt_stream[:, :tokens]
        one.prompt.tokens_P[:] = expected.prompt.tokens_P[:tokens]
        assert one.prompt.cached == cached
        run(cache, shape, [one])
        found = torch.cat(one.prompt_found, dim=1)
        assert torch.equal(found, whole[:, cached:tokens])
        computed, cached = computed + tokens - cached, tokens // 32 * 32
        assert cache.stats.prompt_tokens_computed == computed
    assert all(map(torch.equal, one.found[0], expected.found[0]))


def test_who_reads_a_long_piece_leaves_to_others_what_they_read() -> None:
    """A piece ends before a chunk that another prompt is about to read, and begins behind it."""
    shape = shape_of()
    cache = cache_of(shape, prefix_bytes_max=1 << 28, chunk_tokens=32, piece_tokens=256)
    if not cache._kernel.same:
        pytest.skip("here a row's bits may depend on the piece")
    first, second = (Request(cache, shape, 1, 300, 2) for _request in range(2))
    assert cache.next_piece(first.prompt) == (0, 256)
    assert cache.next_piece(second.prompt) is None
    first.close()
    assert cache.next_piece(second.prompt) == (0, 256)
    third = Request(cache, shape, 1, 300, 2)
    run(cache, shape, [second, third])
    assert cache.stats.prompt_tokens_computed == 300
    assert_same(second, third)
