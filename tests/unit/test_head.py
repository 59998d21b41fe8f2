"""The head without logits against autograd through the whole of them."""

import numpy as np
import pytest
import torch
from torch import Tensor

from formulas import FORMULAS, make_inputs
from tinsmithd.domain import LOSSES, CrossEntropy, LossFn
from tinsmithd.trainer.compute import head as head_module
from tinsmithd.trainer.compute.head import Head, chunk_tokens, head_pass
from tinsmithd.trainer.compute.losses import loss_sum, may_have_gradient

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


def assert_same(ours: Tensor | None, theirs: Tensor | None) -> None:
    assert (ours is None) == (theirs is None)
    if ours is not None:
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


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
    assert float(found.loss) == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-4)
    ours = [g for g in (found.grad_hidden, found.grad_a, found.grad_b) if g is not None]
    assert len(ours) == len(gradients)
    for mine, theirs in zip(ours, gradients, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    positions = may_have_gradient(loss_fn, arrays).nonzero()[0]
    said = head_pass(hidden, head, loss_fn, inputs, LENGTHS, backward=True, positions=positions)
    assert (said.loss, len(positions)) == (found.loss, COUNT)
    for name in ("logprobs", "grad_hidden", "grad_a", "grad_b"):
        assert_same(getattr(said, name), getattr(found, name))
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
    assert float(found.loss) == pytest.approx(float(loss.detach()), rel=1e-5)
    ours = [g for g in (found.grad_hidden, found.grad_a, found.grad_b) if g is not None]
    for mine, theirs in zip(ours, gradients, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)
    assert not found.grad_hidden[3:9].any()


@pytest.mark.parametrize("case", FORMULAS)
@pytest.mark.parametrize("lora", [False, True], ids=["frozen", "lora"])
def test_nothing_is_read_back_from_a_device(
    case: str, lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that holds no numbers cannot be waited for: whoever asks for one fails."""
    monkeypatch.setattr(head_module, "CHUNK_TOKENS_MAX", 4)
    loss_fn = LOSSES[case.split(":")[0]](**FORMULAS[case].config)
    head = make_head(lora=lora)
    away = Head(
        *(None if t is None else t.to("meta") for t in (head.weight, head.lora_a, head.lora_b)),  # type: ignore[arg-type]
        scaling=SCALING,
    )
    made = make_inputs(np.full(COUNT, -3.0), 3)
    inputs = {name: torch.empty(COUNT, 1, device="meta") for name in made}
    inputs["target_tokens"] = torch.empty(COUNT, 1, dtype=torch.int64, device="meta")
    hidden = torch.empty(COUNT, WIDTH, device="meta")
    settings = {"backward": True, "positions": np.array([0, 3, 4, 5, 12])}
    found = head_pass(hidden, away, loss_fn, inputs, LENGTHS, **settings)  # type: ignore[arg-type]
    assert found.grad_hidden is not None
    assert found.grad_hidden.shape == (COUNT, WIDTH)
    with pytest.raises(NotImplementedError):
        head_pass(hidden, away, loss_fn, inputs, LENGTHS, backward=True)


@pytest.mark.parametrize("name", ["cross_entropy", "importance_sampling", "ppo", "cispo", "gspo"])
def test_where_a_loss_has_no_gradient_is_known_from_its_inputs(name: str) -> None:
    """Zero weights, or zero advantages; nothing else of the inputs matters."""
    factor = "weights" if name == "cross_entropy" else "advantages"
    arrays = {factor: np.array([[0, 0], [0, -1], [2, 0]]), "logprobs": np.zeros((3, 2))}
    assert may_have_gradient(LOSSES[name](), arrays).tolist() == [False, True, True]
    of_dro = {"target_tokens": np.zeros((3, 1)), "advantages": np.zeros((3, 1))}
    assert may_have_gradient(LOSSES["dro"](), of_dro).all()


def test_a_chunk_follows_the_memory_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU, as it was built, not as it is filled; on a CPU it has what fits into the cache."""
    for gigabytes, vocab_size, tokens in (
        (80, 151_936, 1024),
        (141, 151_936, 1792),
        (80, 32_000, 4864),
        (1, 151_936, 12),
        (1, 10**9, 1),
    ):
        built = type("Properties", (), {"total_memory": gigabytes * 10**9})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, built=built: built)
        assert chunk_tokens(vocab_size, torch.device("cuda")) == tokens
    assert chunk_tokens(151_936, torch.device("cpu")) == 165
    assert chunk_tokens(10**9, torch.device("cpu")) == 1
