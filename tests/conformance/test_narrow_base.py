"""bfloat16: logits are float32 wherever they are made, so trainer and Sampler agree."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data import collect
from engines import make_engine
from sampling_engines import embedded
from tinsmithd.domain import AdamParams, Datum, LoraConfig
from tinsmithd.modeling.base import load_base
from tinsmithd.modeling.logits import BLOCK_ROWS, differentiable_product, float_logits

torch.set_num_threads(1)
TEXTS = (
    "The capital of France is Paris. It is a city on the river Seine.",
    "Tin melts at 232 degrees, which is not very hot. A tinsmith works with it.",
    "def f(x):\n    return x + 1\n\nprint(f(3))",
)


@pytest.mark.timeout(400)  # a processor without bfloat16 takes 90 s
def test_trainer_and_sampler_agree_in_bfloat16_on_real_weights(real_model: Path) -> None:
    """A trained adapter of rank 8 on SmolLM2 and its head: half of the logprobs to 3e-3 nats, the
    mean to 1e-2.

    The Sampler's products may add in another order than the trainer's, so here and there a sum is
    rounded to the other of two bfloat16 numbers.
    """
    sampler_base = load_base(str(real_model), dtype="bfloat16", on_progress=lambda _: None)
    sequences = [np.array(sampler_base.tokenizer.encode(text)) for text in TEXTS]
    data = [
        Datum(s[:-1], {"target_tokens": s[1:], "weights": np.ones(len(s) - 1, np.float32)})
        for s in sequences
    ]
    trainer = make_engine(
        "deepspeed", str(real_model), dtype="bfloat16", zero_stage=0, on_progress=lambda _: None
    )
    trainer.create_model("m", LoraConfig(rank=8, seed=1))
    _, untrained = collect(trainer, "m", data, backward=False)
    for _ in range(4):
        collect(trainer, "m", data, backward=True)
        trainer.optim_step("m", AdamParams(learning_rate=1e-3))
    _, expected = collect(trainer, "m", data, backward=False)
    sampler = embedded(sampler_base)
    sampler.load_adapter("a", trainer.export_state("m", optimizer=False))
    found = []
    for tokens in sequences:
        found.append(sampler.score(tokens, "a")[1:])
    sampler.close()
    distance = np.abs(np.concatenate(found) - np.concatenate(expected))
    assert np.median(distance) <= 3e-3
    assert distance.mean() <= 1e-2, f"mean {distance.mean():.6f}, max {distance.max():.6f}"
    assert np.abs(np.concatenate(expected) - np.concatenate(untrained)).mean() > 0.1


@pytest.mark.parametrize("vocab_size", [7, 2 * BLOCK_ROWS + 5])
def test_logits_are_never_rounded_below_float32(vocab_size: int) -> None:
    """Against float64: the base's product, an adapter on it, and the way back to hidden states."""
    torch.manual_seed(0)
    hidden = torch.randn(5, 64).bfloat16()
    weight = torch.randn(vocab_size, 64).bfloat16()
    a, b = torch.randn(3, 64), torch.randn(vocab_size, 3)
    product = hidden.double() @ weight.double().t()
    exact = product + 0.5 * hidden.double() @ a.double().t() @ b.double().t()
    found = float_logits(hidden, weight, a, b, 0.5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
    # What bfloat16 would make of it: the measure is not blunt.
    assert (product - product.bfloat16().double()).abs().max() > 1e-2
    leaf = hidden.clone().requires_grad_()
    logits = differentiable_product(leaf, weight)
    torch.testing.assert_close(logits.double(), product, rtol=1e-5, atol=1e-4)
    seed = torch.randn_like(logits).bfloat16().float()
    (grad,) = torch.autograd.grad(logits, leaf, seed)
    expected = (seed.double() @ weight.double()).to(torch.bfloat16)
    torch.testing.assert_close(grad, expected, rtol=2e-2, atol=1e-1)


@pytest.mark.parametrize("train_unembed", [False, True])
def test_every_engine_agrees_with_the_sampler_in_bfloat16(
    tiny_model: Path, train_unembed: bool
) -> None:
    """On a tiny model: trainer and Sampler to 1e-4 but for a rounding that went the other way; the
    reference to bfloat16's rounding."""
    tokens = np.random.default_rng(0).integers(0, 256, 24)
    inputs = {"target_tokens": tokens[1:], "weights": np.ones(23, np.float32)}
    data = [Datum(tokens[:-1], inputs)]
    lora = LoraConfig(rank=4, seed=1, train_unembed=train_unembed)
    logprobs = {}
    for name in ("deepspeed", "reference"):
        engine = make_engine(
            name, str(tiny_model), dtype="bfloat16", zero_stage=0, on_progress=lambda _: None
        )
        engine.create_model("m", lora)
        if name == "deepspeed":
            for _ in range(3):
                collect(engine, "m", data, backward=True)
                engine.optim_step("m", AdamParams(learning_rate=1e-2))
            state = engine.export_state("m", optimizer=False)
        engine.import_state("m", state, optimizer=False)
        _, (logprobs[name],) = collect(engine, "m", data, backward=False)
    base = load_base(str(tiny_model), dtype="bfloat16", on_progress=lambda _: None)
    sampler = embedded(base)
    sampler.load_adapter("a", state)
    found = sampler.score(tokens, "a")[1:]
    sampler.close()
    distance = np.abs(found - logprobs["deepspeed"])
    assert np.quantile(distance, 0.8) <= 1e-4
    assert distance.max() <= 5e-3
    np.testing.assert_allclose(found, logprobs["reference"], atol=0.1)
