"""The head on a GPU: the numbers of a CPU, and nothing in it waits for the host."""

from typing import Any

import numpy as np
import pytest
import torch

from tinsmithd.domain import CrossEntropy
from tinsmithd.trainer.compute import head as head_module
from tinsmithd.trainer.compute.head import Head, HeadResult, head_pass
from tinsmithd.trainer.compute.losses import may_have_gradient

COUNT, WIDTH, VOCAB_SIZE, RANK = 300, 64, 2000, 4


def run(device: str, dtype: torch.dtype) -> HeadResult:
    """A pass over several chunks, of which many positions have no weight."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB_SIZE, WIDTH, generator=draw) * 0.1
    a, b = (torch.randn(shape, generator=draw) for shape in ((RANK, WIDTH), (VOCAB_SIZE, RANK)))
    hidden = torch.randn(COUNT, WIDTH, generator=draw)
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(COUNT, 1)) * (rng.random((COUNT, 1)) < 0.5)
    arrays = {
        "target_tokens": rng.integers(0, VOCAB_SIZE, (COUNT, 1)),
        "weights": weights.astype(np.float32),
    }
    positions = may_have_gradient(CrossEntropy(), arrays).nonzero()[0]
    inputs = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    head = Head(weight.to(device, dtype), (a * 0.1).to(device), (b * 0.1).to(device))
    settings = {"backward": True, "positions": positions}
    return head_pass(hidden.to(device, dtype), head, CrossEntropy(), inputs, (COUNT,), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_gives_what_a_cpu_gives(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same numbers in the same dtype; gradients of the adapter to 1 %."""
    right = run("cpu", dtype)
    monkeypatch.setattr(head_module, "chunk_tokens", lambda *_: 128)
    found = run("cuda", dtype)
    torch.testing.assert_close(found.logprobs.cpu(), right.logprobs, atol=1e-3, rtol=1e-3)
    assert float(found.loss) == pytest.approx(float(right.loss), rel=1e-2, abs=1e-2)
    for name in ("grad_hidden", "grad_a", "grad_b"):
        ours, theirs = getattr(found, name).cpu().float(), getattr(right, name).float()
        assert (ours - theirs).abs().max() <= 1e-2 * theirs.abs().max(), name


def test_nothing_waits_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the inputs on the device to the results on it, but for the numbers of the rows."""
    monkeypatch.setattr(head_module, "chunk_tokens", lambda *_: 128)
    run("cuda", torch.bfloat16)  # loads kernels, which waits
    add, logprobs = head_module._Gradients.add, head_module._Scratch.logprobs

    def watched(method: Any) -> Any:
        def call(*arguments: Any) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return method(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return call

    monkeypatch.setattr(head_module._Gradients, "add", watched(add))
    monkeypatch.setattr(head_module._Scratch, "logprobs", watched(logprobs))
    assert run("cuda", torch.bfloat16).grad_hidden is not None
