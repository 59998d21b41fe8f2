"""From data to logprobs, losses and gradients: what both engines do with one datum."""

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


def target_logprobs(model: Any, tokens: Tensor, targets: Tensor) -> Tensor:
    """Logprobs of target tokens after each position of one sequence.

    Args:
        model: A Hugging Face causal language model, possibly with LoRA layers in it.
        tokens: int64 `(N,)`.
        targets: int64 `(N,)` or `(N, K)`; row i are candidates for the token after position i.

    Returns:
        float32, shaped like `targets`; log-softmax is taken in float32.
    """
    hidden = model.model(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
    wanted = targets if targets.ndim == 2 else targets[:, None]
    parts = []
    for start in range(0, len(tokens), HEAD_CHUNK_TOKENS):
        chunk = slice(start, start + HEAD_CHUNK_TOKENS)
        logits = model.lm_head(hidden[chunk]).float()
        chosen = logits.gather(1, wanted[chunk])
        parts.append(chosen - logits.logsumexp(dim=1, keepdim=True))
    return torch.cat(parts).reshape(targets.shape)


@dataclass(frozen=True)
class DatumResult:
    """What one datum gave.

    Attributes:
        logprobs: float32, shaped like its `target_tokens`.
        loss: Its share of the summed loss.
    """

    logprobs: np.ndarray
    loss: float


def compute_datum(
    model: Any,
    parameters: Sequence[torch.nn.Parameter],
    datum: Datum,
    loss_fn: LossFn,
    gradients: Sequence[Tensor] | None,
    device: torch.device,
) -> DatumResult:
    """Loss and logprobs of one datum.

    Args:
        model: The language model with the right adapter active.
        parameters: The adapter's parameters.
        datum: What to compute.
        loss_fn: Which loss.
        gradients: One buffer per parameter, to which the gradients are added; None computes none
            and builds no graph.
        device: Where the model is.
    """
    tokens = torch.from_numpy(np.array(datum.tokens)).to(device)
    inputs = {
        name: torch.from_numpy(np.array(array)).to(device)
        for name, array in datum.loss_fn_inputs.items()
    }
    with torch.set_grad_enabled(gradients is not None):
        logprobs = target_logprobs(model, tokens, inputs["target_tokens"])
        loss = loss_sum(loss_fn, logprobs, inputs)
    if gradients is not None:
        found = torch.autograd.grad(loss, list(parameters), allow_unused=True)
        for buffer, gradient in zip(gradients, found, strict=True):
            if gradient is not None:
                buffer += gradient
    return DatumResult(logprobs.detach().float().cpu().numpy(), float(loss.detach()))


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
