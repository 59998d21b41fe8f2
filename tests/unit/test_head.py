"""The head without logits against autograd through the whole of them."""

import numpy as np
import pytest
import torch
from torch import Tensor

from formulas import FORMULAS, make_inputs
from tinsmithd.domain import LOSSES, CrossEntropy, LossFn
from tinsmithd.trainer.compute import head as head_module
from tinsmithd.trainer.compute.head import Head, head_pass
from tinsmithd.trainer.compute.losses import loss_sum

LENGTHS = (5, 2, 6)
COUNT, WIDTH, VOCAB_SIZE, RANK = sum(LENGTHS), 16, 50, 3
SCALING = 2.0


def make_head(*, lora: bool) -> Head:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(VOCAB_SIZE, WIDTH, generator=generator)
    if not lora:
        return Head(weight)
    a = torch.randn(RANK, WIDTH, generator=generator) * 0.3
    b = torch.randn(VOCAB_SIZE, RANK, generator=generator) * 0.3
    return Head(weight, a, b, SCALING)


def by_autograd(
    hidden: Tensor, head: Head, loss_fn: LossFn, inputs: dict[str, Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logprobs, loss and gradients, in float64, datum by datum."""
    hidden = hidden.double().requires_grad_()
    leaves = [hidden]
    logits = hidden @ head.weight.double().t()
    if head.lora_a is not None and head.lora_b is not None:
        a, b = head.lora_a.double().requires_grad_(), head.lora_b.double().requires_grad_()
        leaves += [a, b]
        logits = logits + head.scaling * (hidden @ a.t()) @ b.t()
    lp = logits.log_softmax(1).gather(1, inputs["target_tokens"])
    parts = [
        loss_sum(loss_fn, one, {name: split[i] for name, split in _split(inputs).items()})
        for i, one in enumerate(lp.split(LENGTHS))
    ]
    loss = torch.stack(parts).sum()
    return lp, loss, list(torch.autograd.grad(loss, leaves))


def _split(inputs: dict[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
    return {name: value.split(LENGTHS) for name, value in inputs.items()}


@pytest.mark.parametrize("chunk_tokens", [1, 4, 512])
@pytest.mark.parametrize("lora", [False, True], ids=["frozen", "lora"])
@pytest.mark.parametrize("case", FORMULAS)
def test_it_agrees_with_autograd(
    monkeypatch: pytest.MonkeyPatch, case: str, lora: bool, chunk_tokens: int
) -> None:
    """Logprobs, loss and every gradient to 1e-5, whatever the chunks, for every loss."""
    monkeypatch.setattr(head_module, "CHUNK_TOKENS_MAX", chunk_tokens)
    loss_fn = LOSSES[case.split(":")[0]](**FORMULAS[case].config)
    head, rng = make_head(lora=lora), np.random.default_rng(2)
    hidden = torch.from_numpy(rng.normal(size=(COUNT, WIDTH)).astype(np.float32))
    targets = torch.from_numpy(rng.integers(0, VOCAB_SIZE, (COUNT, 1)))
    lp, _, _ = by_autograd(
        hidden, head, CrossEntropy(), {"target_tokens": targets, "weights": torch.ones(COUNT, 1)}
    )
    made = make_inputs(lp.detach().numpy()[:, 0], 3)
    inputs = {name: torch.from_numpy(a.astype(np.float32))[:, None] for name, a in made.items()}
    inputs["target_tokens"] = targets
    lp, loss, gradients = by_autograd(hidden, head, loss_fn, inputs)
    found = head_pass(hidden, head, loss_fn, inputs, LENGTHS, backward=True)
    torch.testing.assert_close(found.logprobs.double(), lp.detach(), rtol=1e-5, atol=1e-5)
    assert found.loss == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-4)
    ours = [g for g in (found.grad_hidden, found.grad_a, found.grad_b) if g is not None]
    assert len(ours) == len(gradients)
    for mine, theirs in zip(ours, gradients, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)
    forward = head_pass(hidden, head, loss_fn, inputs, LENGTHS, backward=False)
    assert torch.equal(forward.logprobs, found.logprobs)
    assert (forward.loss, forward.grad_hidden) == (found.loss, None)


@pytest.mark.parametrize("lora", [False, True], ids=["frozen", "lora"])
def test_many_targets_and_tokens_without_weight(lora: bool) -> None:
    """K candidates per position, the same one twice, negative weights, and whole rows of zeros."""
    head, rng = make_head(lora=lora), np.random.default_rng(4)
    hidden = torch.from_numpy(rng.normal(size=(COUNT, WIDTH)).astype(np.float32))
    targets = torch.from_numpy(rng.integers(0, VOCAB_SIZE, (COUNT, 3)))
    targets[2, 1] = targets[2, 0]
    weights = torch.from_numpy(rng.normal(size=(COUNT, 3)).astype(np.float32))
    weights[3:9] = 0
    inputs = {"target_tokens": targets, "weights": weights}
    lp, loss, gradients = by_autograd(hidden, head, CrossEntropy(), inputs)
    found = head_pass(hidden, head, CrossEntropy(), inputs, LENGTHS, backward=True)
    torch.testing.assert_close(found.logprobs.double(), lp.detach(), rtol=1e-5, atol=1e-5)
    assert found.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    ours = [g for g in (found.grad_hidden, found.grad_a, found.grad_b) if g is not None]
    for mine, theirs in zip(ours, gradients, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)
    assert not found.grad_hidden[3:9].any()
