"""A decoder computes what transformers and PEFT do, and each row apart from the rows beside it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tinsmithd.domain import FullConfig, LoraConfig, ModelState, Tuning
from tinsmithd.errors import FailedPrecondition, NotFound, Reason
from tinsmithd.modeling.base import BaseModel, load_base
from tinsmithd.modeling.lora import Adapters
from tinsmithd.sampler.engines.transformers.model.build import Built, build
from tinsmithd.sampler.engines.transformers.model.check import CausalAttend, Expected
from tinsmithd.sampler.engines.transformers.model.linear import BLOCK_ROWS, Compute, Window
from tinsmithd.sampler.engines.transformers.model.lora_layout import LoraLayout
from tiny_models import write_tiny_model

torch.set_num_threads(1)
MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases, tied": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie": True},
    ),
    "qwen2": ("qwen2", {}),
    "qwen2 with windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe with dense layers": (
        "qwen3_moe",
        {"mlp_only_layers": [0], "norm_topk_prob": True},
    ),
}
TOKENS = 40
ROWS_MAX = 128
LORAS = (
    LoraConfig(rank=4, alpha=8.0, seed=1),
    LoraConfig(rank=4, alpha=8.0, seed=2, train_mlp=False, train_unembed=False),
    LoraConfig(rank=9, alpha=20.0, seed=3),
)
NEIGHBOURS = (0, 3, 31)
K_A = "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"


def load(folder: Path, dtype: str = "float32") -> BaseModel:
    return load_base(str(folder), dtype=dtype, on_progress=lambda _: None)


def make(base: BaseModel) -> Built:
    return build(base, rows_max=ROWS_MAX, keep_rows_apart=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")

    def folder(kind: str) -> Path:
        family, settings = MODELS[kind]
        path = root / kind.replace(" ", "-")
        return path if path.exists() else write_tiny_model(path, family, **settings)

    return folder


def tokens(count: int = TOKENS, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, count))


def states(adapters: Adapters) -> dict[str, ModelState]:
    """Adapters none of whose weights are zero, which PEFT's layers have as well."""
    found = {}
    for number, lora in enumerate(LORAS):
        key = f"adapter {number}"
        adapters.add(key, lora)
        numbers = np.random.default_rng(number)
        weights = {
            name: (numbers.standard_normal(p.shape) * 0.1).astype(np.float32)
            for name, p in adapters.parameters(key).items()
        }
        adapters.import_weights(key, weights)
        found[key] = ModelState(lora, weights, {}, 0, {})
    return found


def logprobs(built: Built, tokens_T: Tensor, keys: Sequence[str | None]) -> Tensor:
    """Of one sequence whose rows are all of its tokens."""
    rows = built.pool.rows(keys, 0)
    attend = CausalAttend(built.decoder.shape)
    hidden = built.decoder.forward(tokens_T, torch.arange(len(tokens_T)), attend, rows)
    return built.decoder.logits(hidden, rows).log_softmax(-1)


@pytest.mark.parametrize("kind", MODELS)
def test_it_computes_what_transformers_does(folders: Callable[[str], Path], kind: str) -> None:
    base = load(folders(kind))
    with torch.no_grad():
        expected = base.model(input_ids=tokens()[None]).logits[0].log_softmax(-1)
    found = logprobs(make(base), tokens(), [None] * TOKENS)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", MODELS)
def test_adapters_are_those_of_peft(folders: Callable[[str], Path], kind: str) -> None:
    """Of any rank, on all layers or on some, over dense layers and experts."""
    built, adapters = make(load(folders(kind))), Adapters(load(folders(kind)))
    for key, state in states(adapters).items():
        size = built.pool.load(key, state)
        assert size > sum(array.nbytes for array in state.weights.values()) / 2
        with torch.no_grad(), adapters.active(key) as model:
            expected = model(input_ids=tokens()[None]).logits[0].log_softmax(-1)
        found = logprobs(built, tokens(), [key] * TOKENS)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dense_layers_round_as_the_trainer_does(folders: Callable[[str], Path], dtype: str) -> None:
    """A whole prompt has the same logprobs in Sampler and trainer, in bfloat16 too."""
    built = make(load(folders("qwen2"), dtype))
    adapters = Adapters(load(folders("qwen2"), dtype), fused=True)
    for key, state in states(adapters).items():
        built.pool.load(key, state)
        with torch.no_grad(), adapters.active(key) as model:
            hidden = model.model(input_ids=tokens()[None]).last_hidden_state[0]
            expected = adapters.head(key).logits(hidden).log_softmax(-1)
        found = logprobs(built, tokens(), [key] * TOKENS)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


class ApartAttend:
    """Attention of rows that are sequences of their own, each after the same few keys."""

    def __init__(self, built: Built) -> None:
        shape = built.decoder.shape
        generator = torch.Generator().manual_seed(0)
        size = (2, 7, shape.kv_heads, shape.head_dim)
        self._before = torch.randn(size, generator=generator).to(shape.dtype)
        self._inner = CausalAttend(shape)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = []
        for row in range(len(q)):
            here = slice(row, row + 1)
            keys = torch.cat((self._before[0], k[here]))
            values = torch.cat((self._before[1], v[here]))
            queries = q[here].expand(len(keys), -1, -1)
            found.append(self._inner(layer, queries, keys, values)[-1])
        return torch.stack(found)


def apart(
    built: Built, tokens_T: Tensor, keys: Sequence[str | None], sequences: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, logits, and logits for draws, of rows that are sequences of their own.

    Those behind the first `sequences` are computed as prompts are.
    """
    count = len(keys) if sequences is None else sequences
    rows = built.pool.rows(keys, count)
    hidden = built.decoder.forward(
        tokens_T, tokens_T % 50, ApartAttend(built), rows, sequences=count
    )
    logits = built.decoder.logits(hidden, rows), built.decoder.draw_logits(hidden, rows)
    return hidden, *logits


def with_adapters(folder: Path, dtype: str) -> tuple[Built, list[str | None]]:
    """A decoder with the keys of its adapters, and None for the base."""
    built = make(load(folder, dtype))
    found = states(Adapters(load(folder, dtype)))
    for key, state in found.items():
        built.pool.load(key, state)
    return built, [None, *found]


@pytest.mark.parametrize("rule", ["any number", "each alone", "8 at most", "in blocks"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3_moe with dense layers"])
def test_a_row_has_the_same_bits_beside_any_others(
    folders: Callable[[str], Path], kind: str, dtype: str, rule: str
) -> None:
    """First or last among 0, 3 or 31 others, which have all adapters or its own."""
    built, keys = with_adapters(folders(kind), dtype)
    assert built.rows_apart
    decided = built.decoder.rule
    assert decided.few[-1] >= max(NEIGHBOURS)
    assert decided.beside[16][-1] >= len(keys)
    if rule == "each alone":
        decided.beside = {}
    if rule == "8 at most":
        decided.few = Window(4, 8).sizes
        decided.lora_few = decided.beside = {16: decided.few}
    if rule == "in blocks":
        decided.few = (BLOCK_ROWS,)
        decided.lora_few = {}
    for key in keys:
        mine = torch.tensor([65])
        alone = apart(built, mine, [key])
        for count in NEIGHBOURS:
            others = tokens(count, seed=count)
            for all_keys in ([key] * count, (keys * count)[:count], [None] * count):
                last = apart(built, torch.cat((others, mine)), [*all_keys, key])
                first = apart(built, torch.cat((mine, others)), [key, *all_keys])
                for own, at_end, at_start in zip(alone, last, first, strict=True):
                    assert torch.equal(own[0], at_end[-1])
                    assert torch.equal(own[0], at_start[0])


def test_many_rows_of_one_adapter_stand_beside_single_ones_of_others(
    folders: Callable[[str], Path],
) -> None:
    """As when a prompt is read while sequences go on: the same bits as each alone."""
    built, keys = with_adapters(folders("llama"), "float32")
    prompt = ["adapter 0"] * TOKENS
    mixed = [*keys, *prompt, None, "adapter 2", *keys]
    all_tokens = tokens(len(mixed))
    every = apart(built, all_tokens, mixed)
    for key in keys:
        places = [place for place, other in enumerate(mixed) if other == key]
        own = apart(built, all_tokens[places], [key] * len(places))
        for alone, found in zip(own, every, strict=True):
            assert torch.equal(alone, found[places])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe with dense layers"])
def test_rows_of_prompts_may_be_computed_otherwise_than_those_of_sequences(
    folders: Callable[[str], Path], kind: str, dtype: str
) -> None:
    """Each kind has the bits that it has alone, whatever the other one computes."""
    built, keys = with_adapters(folders(kind), dtype)
    decided = built.decoder.rule
    decided.few, decided.many, decided.lora_many = (4,), (8, 16), {16: (8, 16)}
    for product in built.decoder.products():
        # As with AMX, products of many rows have other bits.
        product.compute = partial(otherwise, product.compute)
    for sequences, prompts in ((1, 1), (5, 3), (3, 30), (12, 8), (0, 9)):
        all_keys = [keys[i % len(keys)] for i in range(sequences + prompts)]
        all_tokens = tokens(len(all_keys), seed=sequences)
        every = apart(built, all_tokens, all_keys, sequences)[0]
        alone = apart(built, all_tokens[:sequences], all_keys[:sequences])[0] if sequences else []
        for row, own in enumerate(alone):
            assert torch.equal(own, every[row])
        for row in range(sequences, len(all_keys)):
            own = apart(built, all_tokens[row : row + 1], [all_keys[row]], 0)[0][0]
            assert torch.equal(own, every[row])


def otherwise(compute: Compute, x: Tensor) -> Tensor:
    return compute(x) if len(x) <= 4 else compute(x) * (1 + 2**-6)


def test_logits_of_some_of_the_rows(folders: Callable[[str], Path]) -> None:
    built, keys = with_adapters(folders("llama"), "float32")
    rows = built.pool.rows(keys, len(keys))
    assert rows is not None
    hidden, logits, draws = apart(built, tokens(len(keys)), keys)
    for chosen in ([3], [2, 1], [0, 1, 3], [0]):
        found = built.decoder.logits(hidden[chosen], rows.select(chosen))
        assert torch.equal(found, logits[chosen])
        found = built.decoder.draw_logits(hidden[chosen], rows.select(chosen))
        assert torch.equal(found, draws[chosen])
    assert rows.select([0]) is None
    assert built.pool.rows([None, None], 2) is None


def test_an_adapter_can_go_while_rows_have_it(folders: Callable[[str], Path]) -> None:
    built, _keys = with_adapters(folders("llama"), "float32")
    expected = apart(built, tokens(2), ["adapter 0", None])[0]
    rows = built.pool.rows(["adapter 0", None], 2)
    built.pool.unload("adapter 0")
    built.pool.unload("adapter 0")
    found = built.decoder.forward(tokens(2), tokens(2) % 50, ApartAttend(built), rows, sequences=2)
    assert torch.equal(found, expected)
    with pytest.raises(KeyError):
        built.pool.rows(["adapter 0"], 1)


def test_a_model_that_is_computed_otherwise_is_refused(folders: Callable[[str], Path]) -> None:
    """As one with a property that the decoder does not know."""
    other = load(folders("qwen3"))
    with torch.no_grad():
        other.model.model.layers[1].input_layernorm.weight.mul_(1.5)
    expected = Expected(other.model)
    built = make(load(folders("qwen3")))
    message = r"qwen3.*differ from those of transformers by .* nats"
    with pytest.raises(NotFound, match=message) as at:
        expected.check("qwen3", built.decoder)
    assert at.value.reason is Reason.BASE_MODEL_NOT_FOUND


@pytest.mark.parametrize("kind", MODELS)
def test_places_of_adapters_are_those_of_peft(folders: Callable[[str], Path], kind: str) -> None:
    """Names and shapes, whatever of attention, MLPs and head is trained."""
    base = load(folders(kind))
    layout = LoraLayout.of(base.model)
    adapters = Adapters(base)
    for number, parts in enumerate(((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1))):
        attn, mlp, unembed = map(bool, parts)
        lora = LoraConfig(rank=3, train_attn=attn, train_mlp=mlp, train_unembed=unembed)
        if len({bool(layout.targets.chosen(each)[1]) for each in (lora, LoraConfig())}) > 1:
            continue  # PEFT wraps parameters for all adapters of a model or for none
        adapters.add(str(number), lora)
        expected = {name: tuple(p.shape) for name, p in adapters.parameters(str(number)).items()}
        assert layout.places(lora).shapes(lora) == expected


MISFITS: Mapping[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a weight is missing": (lambda w: w.pop(K_A), K_A),
    "a weight too many": (lambda w: w.update({K_A.replace("k_", "z_"): w[K_A]}), "z_proj"),
    "another shape": (
        lambda w: w.update({K_A: w[K_A][:, :-1]}),
        r"\[4, 31\], this model \[4, 32\]",
    ),
    "turned": (lambda w: w.update({K_A: w[K_A].T}), r"\[32, 4\], this model \[4, 32\]"),
    "another rank": (lambda w: w.update({K_A: np.zeros((8, 32), np.float32)}), r"\[8, 32\]"),
    "flat": (lambda w: w.update({K_A: w[K_A].reshape(-1)}), r"\[128\]"),
    "a scalar": (lambda w: w.update({K_A: np.float32(1).reshape(())}), r"\[\]"),
    "no numbers": (lambda w: w.update({K_A: np.full((4, 32), "x")}), f"{K_A}.*dtype"),
    "whole numbers": (lambda w: w.update({K_A: np.zeros((4, 32), np.int64)}), f"{K_A}.*int64"),
    "nothing": (lambda w: w.clear(), "None"),
}


@pytest.mark.parametrize("damage", MISFITS)
def test_an_adapter_that_does_not_fit_is_refused_by_name(
    folders: Callable[[str], Path], damage: str
) -> None:
    """And the decoder is as before."""
    base = load(folders("llama"))
    state = states(Adapters(load(folders("llama"))))["adapter 0"]
    built = make(base)
    change, message = MISFITS[damage]
    weights = dict(state.weights)
    change(weights)
    with pytest.raises(FailedPrecondition, match=message) as refusal:
        built.pool.load("a", ModelState(state.tuning, weights, {}, 0, {}))
    assert refusal.value.reason is Reason.INCOMPATIBLE_CHECKPOINT
    with pytest.raises(KeyError):
        built.pool.rows(["a"], 1)


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        (LoraConfig(rank=1 << 20, alpha=8.0), r"\[4, 32\], this model \[1048576, 32\]"),
        (LoraConfig(rank=4, train_attn=False), "k_proj.*None"),
        (FullConfig(), "all weights, no adapter"),
    ],
)
def test_a_tuning_that_the_weights_are_not_of_is_refused(
    folders: Callable[[str], Path], tuning: Tuning, message: str
) -> None:
    """Before anything of its size is allocated."""
    state = states(Adapters(load(folders("llama"))))["adapter 0"]
    built = make(load(folders("llama")))
    with pytest.raises(FailedPrecondition, match=message):
        built.pool.load("a", ModelState(tuning, state.weights, {}, 0, {}))


def test_numbers_that_are_none_stay_in_their_own_rows(folders: Callable[[str], Path]) -> None:
    """An adapter of infinities, which nobody forbids, harms no row of another."""
    built, keys = with_adapters(folders("llama"), "float32")
    expected = apart(built, tokens(len(keys)), keys)
    state = states(Adapters(load(folders("llama"))))["adapter 0"]
    wild = {name: np.full_like(array, np.inf) for name, array in state.weights.items()}
    built.pool.load("wild", ModelState(state.tuning, wild, {}, 0, {}))
    mine, theirs = tokens(len(keys)), tokens(2, seed=9)
    found = apart(built, torch.cat((mine, theirs)), [*keys, "wild", "wild"])
    for own, all_rows in zip(expected, found, strict=True):
        assert torch.equal(own, all_rows[: len(keys)])
        assert not torch.isfinite(all_rows[len(keys) :]).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_that_was_made_faster_gives_the_same_bits(
    folders: Callable[[str], Path], dtype: str
) -> None:
    """Also to rows that have its weights since before; a key that is not there is no error."""
    built, keys = with_adapters(folders("llama"), dtype)
    mixed = [key for key in keys for _ in range(3)]
    before = apart(built, tokens(len(mixed)), mixed)
    sites = [site for layer in built.pool._adapters["adapter 0"].sites for site in layer if site]
    reorders = dtype == "bfloat16" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert all(site.is_slow for site in sites) == reorders
    for key in (*keys[1:], "another"):
        assert key is not None
        while built.pool.speed_up(key):
            pass
    assert not any(site.is_slow for site in sites)
    after = apart(built, tokens(len(mixed)), mixed)
    for own, others in zip(before, after, strict=True):
        assert torch.equal(own, others)
