"""The KV cache's attention against plain attention in float64, and its bits against each other."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kv_requests import (
    DTYPES,
    Request,
    assert_plain,
    assert_same,
    cache_of,
    run,
    shape_of,
    step,
)
from tinsmithd.sampler.engines.transformers.kv import attention, rows
from tinsmithd.sampler.engines.transformers.kv import cache as kv_cache
from tinsmithd.sampler.engines.transformers.kv.attention import (
    BLOCK_KEYS,
    KeyCounts,
    attend,
    attend_plainly,
    probe,
)

Attended = tuple[Tensor, Tensor]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "windows"),
    [
        (6, 2, 64, (None, None)),
        (2, 2, 16, (None,)),
        (5, 1, 16, (None,)),
        (14, 2, 32, (None,)),
        (8, 2, 8, (40, None)),
        (4, 2, 64, (16, 300)),
        (4, 2, 64, (600,)),
    ],
)
def test_finds_what_plain_attention_finds(
    heads: int, kv_heads: int, head_dim: int, windows: tuple[int | None, ...]
) -> None:
    """Prompts of one piece and of many, alone and in groups, over several sizes of slots."""
    shape = shape_of(group=heads // kv_heads, kv_heads=kv_heads, head_dim=head_dim, windows=windows)
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


@pytest.mark.parametrize(
    ("dtype", "group", "head_dim"),
    [
        (torch.float32, 3, 64),
        (torch.bfloat16, 3, 64),
        (torch.float32, 2, 8),
        (torch.bfloat16, 7, 128),
    ],
    ids=str,
)
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
    expected = torch.cat([*one.prompt_found, torch.stack(one.found[0], dim=1)], dim=1)
    if cache._kernel.same:
        assert torch.equal(found, expected)
    else:  # BLAS sums each row of a product in another way: see the cache's own test of that
        tolerance = 1e-5 if dtype == torch.float32 else 0.03
        assert (found - expected).abs().max() < tolerance


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


def test_devices_without_the_kernel_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two products and a softmax in the place of the CPU's kernel."""
    monkeypatch.setattr(rows, "attend", attend_plainly)
    shape = shape_of(windows=(None, 40))
    cache = cache_of(shape)
    requests = [Request(cache, shape, 1, 150, 60), Request(cache, shape, 2, 600, 9)]
    wide = shape_of()
    others = cache_of(wide)
    group = Request(others, wide, 3, 300, 20, 3)
    run(cache, shape, requests)
    run(others, wide, [group])
    for one in [*requests, group]:
        assert_plain(one, 1e-5)


def test_machines_on_which_only_whole_blocks_of_keys_are_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the probe may find elsewhere: all keys are read by the block, and groups keep rows."""
    monkeypatch.setattr(kv_cache, "probe", lambda *_: (KeyCounts([BLOCK_KEYS]), False))
    shape = shape_of(torch.bfloat16)
    alone, cache = cache_of(shape), cache_of(shape)
    sizes = [(300, 30, 5), (20, 30, 1), (700, 9, 1)]
    for seed, size in enumerate(sizes, 1):
        one, other = Request(alone, shape, seed, *size), Request(cache, shape, seed, *size)
        run(alone, shape, [one])
        beside = [Request(cache, shape, 9, 270, 10, 2), Request(cache, shape, 10, 60, 12)]
        run(cache, shape, [*beside, other])
        assert_plain(one, 0.03)
        assert_same(one, other)


def test_the_probe_sees_how_sums_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that starts anew in the middle of some numbers of keys is found out."""

    def halves(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float
    ) -> tuple[Tensor, Tensor]:
        count = k.shape[2] % BLOCK_KEYS
        if count != 64 or mask is None:
            return attend(q, k, v, mask, scaling)
        # The later keys first.
        turned = torch.arange(k.shape[2]).roll(count // 2)
        return attend(q, k[:, :, turned], v[:, :, turned], mask[..., turned], scaling)

    before, _same = probe(torch.float32, torch.device("cpu"), 64, 4, 0.125)
    assert before.padded(33) == 64
    monkeypatch.setattr(attention, "attend", halves)
    counts, _same = probe(torch.float32, torch.device("cpu"), 64, 4, 0.125)
    assert counts.padded(33) > 64
    for keys in (1, 31, 32, 33, 192, 193, 384, 385, 512, 513, 800, 1024):
        padded = counts.padded(keys)
        assert keys <= padded <= -(-keys // BLOCK_KEYS) * BLOCK_KEYS
        assert counts.padded(padded) == padded
    assert KeyCounts([64, 512]).padded(65) == 512
    assert KeyCounts([64, 512]).padded(570) == 576
    assert KeyCounts([64, 512]).padded(577) == 1024


def test_a_kernel_whose_rows_differ_is_used_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some BLAS sums each row of a product in another way: then whole blocks are read, and a row
    keeps its place, so that neighbours change no bit."""

    def uneven(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Attended:
        out, sums = attend(q, k, v, mask, scaling)
        return out + 1e-7 * torch.arange(q.shape[2])[:, None], sums

    monkeypatch.setattr(attention, "attend", uneven)
    counts, same = probe(torch.float32, torch.device("cpu"), 16, 4, 0.25)
    assert (counts.padded(1), counts.padded(BLOCK_KEYS + 1)) == (BLOCK_KEYS, 2 * BLOCK_KEYS)
    assert not same
    shape = shape_of()
    found = []
    for neighbours in (0, 3):
        cache = cache_of(shape)
        one = Request(cache, shape, 1, 700, 5, 3)
        beside = [Request(cache, shape, 2 + n, 90, 9) for n in range(neighbours)]
        run(cache, shape, [one, *beside])
        assert_plain(one, 1e-5)
        found.append(one)
    assert_same(*found)
