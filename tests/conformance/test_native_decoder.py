"""The compiled decoder computes what torch does: dense families, adapters, windows, shared prompts.

It is driven as the scheduler does: prompts are read into a cache, and tokens follow one by one.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from tinsmithd.domain import LoraConfig, ModelState
from tinsmithd.modeling.base import BaseModel, load_base
from tinsmithd.modeling.lora import Adapters
from tinsmithd.sampler.engines.transformers.kv import KvCache
from tinsmithd.sampler.engines.transformers.model.build import Built, build
from tinsmithd.sampler.engines.transformers.model.check import CausalAttend
from tinsmithd.sampler.engines.transformers.native import NativeDecoder, compiling
from tinsmithd.sampler.engines.transformers.native.compiling import usable_variants
from tinsmithd.sampler.engines.transformers.start import Started, start
from tiny_models import write_tiny_model

torch.set_num_threads(1)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases, tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie": True}),
    "qwen2 with windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {}),
}
NARROW_KINDS = {**KINDS, "llama with heads of whole tiles": ("llama", {"head_dim": 32})}
LORAS = (LoraConfig(rank=4, alpha=8.0, seed=1), LoraConfig(rank=9, alpha=20.0, seed=2))
READ, MADE = 70, 9
"""Tokens that are read at once, and those that follow; together more than a block of keys."""

SAMPLES = (1, 3, 21)
LONG = 600
"""Tokens of a prompt that has more than one of the blocks of keys that bfloat16 has."""


NARROW_GAP_MAX = 5e-3
"""Mean gap of logprobs in bfloat16, in nats."""


class Both(NamedTuple):
    """One model, twice."""

    native: Started
    plain: Built
    keys: list[str | None]


def states(base: BaseModel) -> dict[str, ModelState]:
    """Adapters none of whose weights are zero."""
    adapters, found = Adapters(base), {}
    for number, lora in enumerate(LORAS):
        adapters.add(str(number), lora)
        dice = np.random.default_rng(number)
        weights = {
            name: (dice.standard_normal(p.shape) * 0.1).astype(np.float32)
            for name, p in adapters.parameters(str(number)).items()
        }
        found[str(number)] = ModelState(lora, weights, {}, 0, {})
    return found


def both(folder: Path, dtype: str = "float32") -> Both:
    def base() -> BaseModel:
        return load_base(str(folder), dtype=dtype, on_progress=lambda _: None)

    native = start(
        *(base(),),
        rows_max=64,
        keep_rows_apart=True,
        native="always",
        native_folder="",
        on_progress=print,
    )
    assert isinstance(native.decoder, NativeDecoder)
    plain = build(base(), rows_max=64, keep_rows_apart=True)
    found = states(base())
    for key, state in found.items():
        native.pool.load(key, state)
        plain.pool.load(key, state)
    return Both(native, plain, [None, *found])


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Both]:
    family, settings = KINDS[request.param]
    found = both(write_tiny_model(tmp_path / "model", family, **settings))
    yield found
    found.native.close()


def narrow_cases() -> list[tuple[str, str]]:
    """Kinds with the best instructions, and two of them with all that there are."""
    best, *others = usable_variants() or [""]
    return [
        *((kind, best) for kind in NARROW_KINDS),
        *((kind, variant) for kind in (*NARROW_KINDS,)[-2:] for variant in others),
    ]


@pytest.fixture(params=narrow_cases(), ids=", ".join)
def narrow_pair(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Both]:
    kind, variant = request.param
    monkeypatch.setattr(compiling, "usable_variants", lambda: [variant])
    family, settings = NARROW_KINDS[kind]
    folder = write_tiny_model(tmp_path / "model", family, context_length=2 * LONG, **settings)
    found = both(folder, "bfloat16")
    yield found
    found.native.close()


def tokens(seed: int, count: int = READ + MADE) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, count))


def walked(
    made: Started, every: Sequence[Tensor], keys: Sequence[str | None], read: int = READ
) -> list[Tensor]:
    """Logits of all tokens of some sequences, whose next tokens share steps."""
    decoder = made.decoder
    cache = KvCache(decoder.shape, bytes_max=1 << 30, prefix_bytes_max=0, chunk_tokens=256)
    hidden: list[list[Tensor]] = []
    open_ones = {}
    for number, own in enumerate(every):
        room_of = cache.reserve(read, len(own) - read, 1)
        assert room_of is not None
        prompt = cache.open_prompt(room_of, "", own[:read].numpy())
        hidden.append([])
        while (piece := cache.next_piece(prompt)) is not None:
            step = cache.batch([], [(prompt, *piece)])
            rows = made.pool.rows([keys[number]] * (piece[1] - piece[0]), 0)
            here = own[slice(*piece)]
            hidden[number].append(decoder.forward(here, step.positions_T, step, rows))
            step.commit()
        (sequence,) = cache.fork(prompt)
        open_ones[sequence] = number
        cache.close_prompt(prompt)
    for place in range(read, len(every[0])):
        step = cache.batch(list(open_ones), [])
        order = [open_ones[sequence] for sequence in step.sequences]
        here = torch.stack([every[number][place] for number in order])
        rows = made.pool.rows([keys[number] for number in order], len(order))
        found = decoder.forward(here, step.positions_T, step, rows, sequences=len(order))
        step.commit()
        for number, row in zip(order, found, strict=True):
            hidden[number].append(row[None])
    made_logits = []
    for number, parts in enumerate(hidden):
        rows = made.pool.rows([keys[number]] * len(every[number]), 0)
        made_logits.append(decoder.draw_logits(torch.cat(parts), rows))
    return made_logits


def plainly(plain: Built, own: Tensor, key: str | None) -> Tensor:
    """Logits of torch's decoder."""
    rows = plain.pool.rows([key] * len(own), 0)
    attend = CausalAttend(plain.decoder.shape)
    hidden = plain.decoder.forward(own, torch.arange(len(own)), attend, rows)
    return plain.decoder.logits(hidden, rows)


def test_it_computes_what_torch_does(pair: Both) -> None:
    """Base and adapters of other ranks in one step; and alone, with the same bits."""
    every = [tokens(seed) for seed in range(len(pair.keys))]
    together = walked(pair.native, every, pair.keys)
    for own, key, found in zip(every, pair.keys, together, strict=True):
        expected = plainly(pair.plain, own, key)
        torch.testing.assert_close(
            found.log_softmax(-1), expected.log_softmax(-1), atol=2e-5, rtol=0
        )
        (alone,) = walked(pair.native, [own], [key])
        assert torch.equal(alone, found)
    (first,) = walked(pair.native, every[:1], pair.keys[:1], read=3)
    assert torch.equal(first, together[0]), "a prompt's rows are those of tokens"


def test_samples_of_a_shared_prompt_are_as_one_sequence_each(pair: Both) -> None:
    """Long prompts are kept once for all samples, and many samples meet their keys together: where
    keys lie, and who reads them, changes no bit."""
    assert_samples_are_alike(pair.native, 300)


def assert_samples_are_alike(made: Started, count: int) -> None:
    """Samples of one prompt of so many tokens have the same bits, however many they are."""
    decoder, prompt_tokens, rest = made.decoder, tokens(1, count), tokens(2, 4)
    found = {}
    for samples in SAMPLES:
        cache = KvCache(decoder.shape, bytes_max=1 << 30, prefix_bytes_max=0, chunk_tokens=1024)
        room_of = cache.reserve(count, 5, samples)
        assert room_of is not None
        prompt = cache.open_prompt(room_of, "", prompt_tokens.numpy())
        step = cache.batch([], [(prompt, 0, count)])
        decoder.forward(prompt_tokens, step.positions_T, step, None)
        step.commit()
        sequences = cache.fork(prompt)
        rows = []
        for token in rest:
            step = cache.batch(sequences, [])
            here = token.repeat(samples)
            rows.append(
                decoder.forward(here, step.positions_T, step, None, sequences=samples).clone()
            )
            step.commit()
        found[samples] = torch.stack(rows)
    for samples in SAMPLES:
        for sample in range(samples):
            assert torch.equal(found[samples][:, sample], found[1][:, 0])


def test_in_bfloat16_it_rounds_where_torch_does(narrow_pair: Both) -> None:
    """Most logprobs are torch's to float32: no rounding is missing, and none is elsewhere. Where a
    sum is the other way of two bfloat16, a row is off by bfloat16's own rounding."""
    every = [tokens(seed) for seed in range(len(narrow_pair.keys))]
    together = walked(narrow_pair.native, every, narrow_pair.keys)
    for own, key, found in zip(every, narrow_pair.keys, together, strict=True):
        expected = plainly(narrow_pair.plain, own, key).log_softmax(-1)
        gaps = (found.log_softmax(-1) - expected).abs().mean(-1)
        assert gaps.mean() < NARROW_GAP_MAX
        print(key, f"mean gap {gaps.mean():.1e}, median {gaps.median():.1e}")
        assert gaps.median() < 1e-5
        (alone,) = walked(narrow_pair.native, [own], [key])
        assert torch.equal(alone, found)


def test_in_bfloat16_the_pieces_of_a_prompt_change_no_bit(narrow_pair: Both) -> None:
    """Nor who shares it, where its keys are more than a block."""
    decoder, own = narrow_pair.native.decoder, tokens(5, LONG)
    found = []
    for chunk in (64, 128, 1024):
        cache = KvCache(decoder.shape, bytes_max=1 << 30, prefix_bytes_max=0, chunk_tokens=chunk)
        room_of = cache.reserve(LONG, 1, 1)
        assert room_of is not None
        prompt = cache.open_prompt(room_of, "", own.numpy())
        parts = []
        while (piece := cache.next_piece(prompt)) is not None:
            step = cache.batch([], [(prompt, *piece)])
            parts.append(decoder.forward(own[slice(*piece)], step.positions_T, step, None))
            step.commit()
        found.append(torch.cat(parts))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])
    assert_samples_are_alike(narrow_pair.native, LONG)
