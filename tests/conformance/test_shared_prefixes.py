"""What several data begin with is computed once, and every number is as if it were not."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.sides import READ_GRADIENTS
from data import begin_alike, make_data
from engines import make_engine
from formulas import FORMULAS
from tinsmithd.domain import LOSSES, CrossEntropy, Datum, FullConfig, LoraConfig, LossFn
from tinsmithd.trainer.engines.interface import Batch
from tiny_models import FAMILIES, write_tiny_model

LORA = LoraConfig(rank=4, seed=7)
PROMPT, INSTRUCTIONS = 24, 18


def rollouts(seed: int, *, targets: int | None = None) -> list[Datum]:
    """Two prompts after the same instructions, of each some rollouts; one datum twice, and others
    that have nothing in common with them."""
    groups = [
        begin_alike(seed + n, make_data(seed + n, 3, targets=targets), PROMPT) for n in range(2)
    ]
    alike = begin_alike(seed, [*groups[0], *groups[1], groups[0][0]], INSTRUCTIONS)
    return [*alike[:4], *make_data(seed + 9, 2, targets=targets), *alike[4:]]


@dataclass(frozen=True)
class Computed:
    """Of a call: the summed loss, logprobs of each datum, gradients by name, its composition."""

    loss: float
    logprobs: Sequence[np.ndarray]
    gradients: Mapping[str, np.ndarray]
    composition: bytes


def computed(
    engine: Any,
    data: Sequence[Datum],
    loss_fn: LossFn | None = None,
    tuning: Any = LORA,
    composition: bytes = b"",
) -> Computed:
    logprobs: list[np.ndarray] = []
    engine.create_model("m", tuning)
    result = engine.forward(
        Batch("m", data, loss_fn or CrossEntropy(), backward=True, composition=composition),
        lambda _, output: logprobs.append(output["logprobs"]),
    )
    engine.optim_step("m", READ_GRADIENTS)
    moments = engine.export_state("m", optimizer=True).optimizer
    engine.delete_model("m")
    gradients = {name: array for name, array in moments.items() if "exp_avg_sq" not in name}
    return Computed(result.metrics["loss:sum"], logprobs, gradients, result.composition)


def assert_same(ours: Computed, theirs: Computed) -> None:
    """To 1e-5, gradients of the largest of all."""
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5, abs=1e-4)
    for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert ours.gradients.keys() == theirs.gradients.keys()
    most = max(np.abs(array).max() for array in theirs.gradients.values())
    for name, array in theirs.gradients.items():
        assert np.abs(ours.gradients[name] - array).max() <= 1e-5 * most, name


def bits(found: Computed) -> tuple[float, bytes, list[bytes]]:
    arrays = [*found.logprobs, *found.gradients.values()]
    return found.loss, found.composition, [array.tobytes() for array in arrays]


@pytest.fixture
def tokens_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each forward of a model so far."""
    import tinsmithd.trainer.compute.packed as packed

    found: list[int] = []
    before = packed._hidden

    def counted(*inputs: Any) -> Any:
        hidden = before(*inputs)
        found.append(len(hidden))
        return hidden

    monkeypatch.setattr(packed, "_hidden", counted)
    return found


@pytest.mark.parametrize("family", list(FAMILIES))
def test_shared_tokens_change_no_number(
    folders: Callable[[str], Path], family: str, tokens_of: list[int]
) -> None:
    """Of one target or several a position, in one micro-batch or many, with layers computed again
    or not: as the reference engine, which shares nothing."""
    reference = make_engine("reference", str(folders(family)))
    for targets in (None, 3):
        data = rollouts(1, targets=targets)
        expected = computed(reference, data)
        whole = sum(len(datum.tokens) for datum in data)
        engine = make_engine("deepspeed", str(folders(family)))
        ours = computed(engine, data)
        assert_same(ours, expected)
        (once,) = tokens_of
        assert once == whole - 6 * INSTRUCTIONS - 5 * PROMPT
        recomputed = ours.composition.replace(b"[[[[0,", b"[[[[1,")
        assert_same(computed(engine, data, composition=recomputed), expected)
        engine = make_engine("deepspeed", str(folders(family)), micro_batch_tokens_max=110)
        tokens_of.clear()
        assert_same(computed(engine, data), expected)
        assert len(tokens_of) > 1
        assert sum(tokens_of) < whole - 4 * PROMPT
        tokens_of.clear()


@pytest.mark.parametrize("case", FORMULAS)
def test_each_loss_is_of_each_datum(tiny_model: Path, case: str) -> None:
    """A shared token has the weight, the target and the gradient that each datum gives it."""
    rng, loss_fn = np.random.default_rng(3), LOSSES[case.split(":")[0]](**FORMULAS[case].config)
    data = []
    for datum in rollouts(4):
        count = len(datum.tokens)
        made = {
            "logprobs": rng.normal(-5.5, 0.2, count),
            "advantages": rng.normal(size=count) * (rng.random(count) < 0.6),
            "weights": rng.normal(size=count) * (rng.random(count) < 0.6),
            "sequence_ratio_mask": np.ones(count),
        }
        own = {name: made[name].astype(np.float32) for name in FORMULAS[case].inputs}
        targets = datum.loss_fn_inputs["target_tokens"]
        data.append(Datum(datum.tokens, {"target_tokens": targets, **own}))
    found = [
        computed(make_engine(name, str(tiny_model)), data, loss_fn)
        for name in ("deepspeed", "reference")
    ]
    assert_same(*found)


def test_adapters_on_the_head_and_full_models_share_too(tiny_model: Path) -> None:
    """The head's own gradients are sums over the data."""
    for tuning in (LoraConfig(rank=4, seed=7, train_unembed=True), FullConfig()):
        found = [
            computed(make_engine(name, str(tiny_model)), rollouts(2), tuning=tuning)
            for name in ("deepspeed", "reference")
        ]
        assert_same(*found)


def test_windows_reach_into_what_is_shared(tmp_path: Path) -> None:
    """A window that ends within a datum's own tokens, in the prompt, and in the instructions."""
    folder = write_tiny_model(
        *(tmp_path / "model", "qwen3"),
        layer_types=["full_attention", "sliding_attention"],
        use_sliding_window=True,
        sliding_window=30,
    )
    found = [
        computed(make_engine(name, str(folder)), rollouts(3)) for name in ("deepspeed", "reference")
    ]
    assert_same(*found)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_long_contexts_are_met_part_by_part(
    folders: Callable[[str], Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each segment above by itself, and joined."""
    from tinsmithd.modeling import in_context

    monkeypatch.setattr(in_context, "KEYS_MIN", 1)
    found = [
        computed(make_engine(name, str(folders(family))), rollouts(7))
        for name in ("deepspeed", "reference")
    ]
    assert_same(*found)


def test_long_data_meet_their_context_in_blocks(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many queries as they like."""
    from tinsmithd.modeling import packing

    expected = computed(make_engine("deepspeed", str(tiny_model)), rollouts(5))
    monkeypatch.setattr(packing, "CONTEXT_BLOCK_TOKENS", 3)
    found = computed(make_engine("deepspeed", str(tiny_model)), rollouts(5))
    assert_same(found, expected)


def kept_bytes(engine: Any, data: Sequence[Datum]) -> int:
    """Bytes that a call keeps for the way back."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        computed(engine, data)
    return sum(storage.nbytes() for storage in storages.values())


def test_what_is_shared_keeps_no_more_than_its_tokens(tiny_model: Path) -> None:
    """Neither keys of the tokens above, nor a mask as large as the rollouts times the prompt."""
    data = begin_alike(8, make_data(8, 12), 300)
    whole = sum(len(datum.tokens) for datum in data)
    once = whole - 11 * 300
    kept = [
        kept_bytes(make_engine("deepspeed", str(tiny_model), share_prefixes=share), data)
        for share in (True, False)
    ]
    assert kept[0] / once < 1.1 * kept[1] / whole


def test_a_call_is_made_again_to_the_same_bits_whatever_the_setting(tiny_model: Path) -> None:
    """What it was computed with is in its composition, also of one that shared nothing."""
    data = rollouts(6)
    for share in (True, False):
        first, second = (
            make_engine("deepspeed", str(tiny_model), share_prefixes=setting)
            for setting in (share, not share)
        )
        found = computed(first, data)
        assert (b"],1,1]" in found.composition) == share
        assert bits(computed(second, data, composition=found.composition)) == bits(found)


def test_bits_of_a_shared_call_are_its_own(tiny_model: Path) -> None:
    """Computed twice, they are the same, on several threads too."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        data = begin_alike(1, make_data(1, 60), 40)
        engine = make_engine("deepspeed", str(tiny_model))
        assert bits(computed(engine, data)) == bits(computed(engine, data))
    finally:
        torch.set_num_threads(before)
