"""Experts as grouped products: the function of transformers and PEFT, without their copies."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tinsmithd.modeling.base import BaseModel, load_base
from tinsmithd.modeling.grouped_experts import use_grouped_experts
from tinsmithd.modeling.lora import Adapters
from tinsmithd.modeling.trained import TrainedWeights
from tinsmithd.tunings import LoraConfig
from tiny_models import write_tiny_model

TOKENS = 96
KEPT_RATIO_MAX = 1.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many experts, most of which get no token."""
    return write_tiny_model(
        *(tmp_path_factory.mktemp("experts") / "model", "qwen3_moe"),
        **{"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True},
    )


def load(folder: Path, dtype: str = "float32") -> BaseModel:
    return load_base(str(folder), dtype=dtype, on_progress=lambda _: None)


def adapted(folder: Path, *loras: LoraConfig, fused: bool, dtype: str = "float32") -> Adapters:
    """Adapters that do something, named by their number."""
    base = load(folder, dtype)
    if fused:
        use_grouped_experts(base)
    adapters = Adapters(base, fused=fused)
    torch.manual_seed(1)
    for number, lora in enumerate(loras):
        adapters.add(str(number), lora)
        for parameter in adapters.parameters(str(number)).values():
            torch.nn.init.normal_(parameter, std=0.1)
    return adapters


def forward(adapters: TrainedWeights, key: str, tokens: int = TOKENS) -> torch.Tensor:
    torch.manual_seed(2)
    with adapters.active(key) as model:
        made: torch.Tensor = model.model(
            input_ids=torch.randint(320, (1, tokens)), use_cache=False
        ).last_hidden_state
    return made


def gradients(adapters: Adapters, key: str) -> dict[str, torch.Tensor]:
    """Of a sum in which every element of the result has its own weight."""
    made = forward(adapters, key)
    parameters = {n: p for n, p in adapters.parameters(key).items() if "lm_head" not in n}
    weights = torch.linspace(-1, 1, made.numel()).view(made.shape)
    found = torch.autograd.grad((made.float() * weights).sum(), list(parameters.values()))
    return {"made": made.detach(), **dict(zip(parameters, found, strict=True))}


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_results_and_gradients_are_those_of_peft(folder: Path, rank: int) -> None:
    """Of two adapters on the same experts, whatever ranks grouped products pad; by their norms."""
    loras = [LoraConfig(rank=rank), LoraConfig(rank=rank, expert_rank=1, train_attn=False)]
    ours, theirs = (adapted(folder, *loras, fused=fused) for fused in (True, False))
    for key in ("0", "1"):
        expected = gradients(theirs, key)
        for name, found in gradients(ours, key).items():
            assert distance(found, expected[name]) < 1e-5, name


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_a_layer_in_bfloat16_is_that_of_peft(folder: Path) -> None:
    """Result and gradients of one layer: routers of more would round tokens to other experts."""
    both = []
    for fused in (True, False):
        adapters = adapted(folder, LoraConfig(rank=3), fused=fused, dtype="bfloat16")
        torch.manual_seed(3)
        x = torch.randn(TOKENS, 32, dtype=torch.bfloat16, requires_grad=True)
        index = torch.stack([torch.randperm(128)[:8] for _ in range(TOKENS)])
        shares = torch.rand(TOKENS, 8, dtype=torch.bfloat16, requires_grad=True)
        weights = {n: p for n, p in adapters.parameters("0").items() if "layers.0.mlp" in n}
        with adapters.active("0") as model:
            made = model.model.layers[0].mlp.experts(x, index, shares)
        grad = torch.randn(made.shape, dtype=made.dtype)
        both.append([made, *torch.autograd.grad(made, [x, shares, *weights.values()], grad)])
    for ours, theirs in zip(*both, strict=True):
        assert ours.dtype == theirs.dtype
        assert distance(ours.float(), theirs.float()) < 0.02


class Other(torch.nn.Module):
    """An activation that no formula here knows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.tanh() + x.square()


def test_any_activation_is_differentiated(folder: Path) -> None:
    """The second half of an expert goes through the model's own activation."""
    found = []
    for fused in (True, False):
        adapters = adapted(folder, LoraConfig(rank=4), fused=fused)
        with adapters.active("0") as model:
            for layer in model.model.layers:
                layer.mlp.experts.get_base_layer().act_fn = Other()
        found.append(gradients(adapters, "0"))
    for name, expected in found[1].items():
        assert distance(found[0][name], expected) < 1e-5, name


@contextmanager
def kept() -> Iterator[dict[int, int]]:
    """Bytes that autograd saves meanwhile, by address."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


def kept_above_parameters(folder: Path, lora: LoraConfig, *, fused: bool) -> int:
    adapters = adapted(folder, lora, fused=fused)
    with adapters.active("0") as model, kept() as storages:
        graph = forward(adapters, "0")
        weights: Any = {p.untyped_storage().data_ptr() for p in model.parameters()}
        assert graph.requires_grad
    return sum(size for at, size in storages.items() if at not in weights)


def test_a_forward_keeps_no_copies_of_experts(folder: Path) -> None:
    """With adapters on experts hardly more than with adapters on attention alone."""
    attention = LoraConfig(rank=8, train_mlp=False)
    ours, theirs = (
        kept_above_parameters(folder, LoraConfig(rank=8), fused=fused) for fused in (True, False)
    )
    of_attention = kept_above_parameters(folder, attention, fused=True)
    assert ours <= KEPT_RATIO_MAX * of_attention
    assert theirs > 2 * ours
