"""What the KV cache holds, and gives back."""

import numpy as np
import torch

from kv_requests import (
    Request,
    assert_plain,
    assert_same,
    cache_of,
    run,
    shape_of,
    step,
)


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
