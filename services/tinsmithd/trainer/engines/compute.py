"""From data to logprobs, losses and gradients: what both engines do with some data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinsmithd.domain import Datum, LossFn
from tinsmithd.trainer.engines.losses import loss_sum

HEAD_CHUNK_TOKENS = 512
"""Positions whose logits are made at once."""


@dataclass(frozen=True)
class DatumResult:
    """What one datum gave.

    Attributes:
        logprobs: float32, shaped like its `target_tokens`.
        loss: Its share of the summed loss.
    """

    logprobs: np.ndarray
    loss: float


def target_logprobs(
    model: Any, tokens: Sequence[Tensor], targets: Sequence[Tensor]
) -> list[Tensor]:
    """Logprobs of target tokens after each position of some sequences.

    Args:
        model: A Hugging Face causal language model, possibly with LoRA layers in it. For more than
            one sequence it must take `segment_lengths` (`modeling.packing`).
        tokens: int64 `(N,)` each.
        targets: int64 `(N,)` or `(N, K)` each; row i are candidates for the token after position i.

    Returns:
        float32, shaped like `targets`; log-softmax is taken in float32.
    """
    packed: dict[str, Any] = {}
    if len(tokens) > 1:
        positions = [torch.arange(len(t), device=t.device) for t in tokens]
        packed["position_ids"] = torch.cat(positions)[None]
        packed["segment_lengths"] = [len(t) for t in tokens]
    hidden = model.model(
        input_ids=torch.cat(list(tokens))[None], use_cache=False, **packed
    ).last_hidden_state[0]
    wanted = _stack_targets(targets)
    parts = []
    for start in range(0, len(hidden), HEAD_CHUNK_TOKENS):
        chunk = slice(start, start + HEAD_CHUNK_TOKENS)
        logits = model.lm_head(hidden[chunk]).float()
        chosen = logits.gather(1, wanted[chunk])
        parts.append(chosen - logits.logsumexp(dim=1, keepdim=True))
    rows = torch.split(torch.cat(parts), [len(t) for t in targets])
    return [
        found[:, : target[0].numel()].reshape(target.shape)
        for found, target in zip(rows, targets, strict=True)
    ]


def _stack_targets(targets: Sequence[Tensor]) -> Tensor:
    """All targets as `(sum of N, largest K)`; what is missing is token 0, and cut off later."""
    wide = [target.reshape(len(target), -1) for target in targets]
    width = max(target.shape[1] for target in wide)
    return torch.cat([torch.nn.functional.pad(t, (0, width - t.shape[1])) for t in wide])


def compute_data(
    model: Any,
    parameters: Sequence[torch.nn.Parameter],
    data: Sequence[Datum],
    loss_fn: LossFn,
    gradients: Sequence[Tensor] | None,
    device: torch.device,
) -> list[DatumResult]:
    """Losses and logprobs of some data, in one forward and at most one backward.

    Args:
        model: The language model with the right adapter active.
        parameters: The adapter's parameters.
        data: What to compute together.
        loss_fn: Which loss.
        gradients: One buffer per parameter, to which the gradients are added; None computes none
            and builds no graph.
        device: Where the model is.
    """
    tokens = [torch.from_numpy(np.array(datum.tokens)).to(device) for datum in data]
    inputs = [
        {k: torch.from_numpy(np.array(v)).to(device) for k, v in datum.loss_fn_inputs.items()}
        for datum in data
    ]
    with torch.set_grad_enabled(gradients is not None):
        logprobs = target_logprobs(model, tokens, [i["target_tokens"] for i in inputs])
        losses = [loss_sum(loss_fn, lp, i) for lp, i in zip(logprobs, inputs, strict=True)]
    if gradients is not None:
        found = torch.autograd.grad(torch.stack(losses).sum(), list(parameters), allow_unused=True)
        for buffer, gradient in zip(gradients, found, strict=True):
            if gradient is not None:
                buffer += gradient
    return [
        DatumResult(lp.detach().float().cpu().numpy(), float(loss.detach()))
        for lp, loss in zip(logprobs, losses, strict=True)
    ]


class WaitingGradients:
    """The gradients that wait for a step: one float32 buffer per parameter, or none yet."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._parameters = parameters
        self._buffers: list[Tensor] | None = None

    def buffers(self) -> list[Tensor]:
        """The buffers, zero where nothing waits."""
        if self._buffers is None:
            self._buffers = [torch.zeros_like(p) for p in self._parameters]
        return self._buffers

    def snapshot(self) -> list[Tensor] | None:
        """A copy to go back to."""
        return None if self._buffers is None else [buffer.clone() for buffer in self._buffers]

    def restore(self, snapshot: list[Tensor] | None) -> None:
        """Go back to a copy."""
        self._buffers = snapshot

    def clear(self) -> None:
        """Nothing waits any more."""
        self._buffers = None

    def all_finite(self) -> bool:
        """True when no waiting gradient is NaN or infinite."""
        return all(bool(torch.isfinite(buffer).all()) for buffer in self.buffers())
