"""Computes loss and gradients of one datum, the plain way."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from tinsmithd.domain import Datum, LossFn
from tinsmithd.modeling.logits import differentiable_product
from tinsmithd.modeling.trained import HeadLayer
from tinsmithd.trainer.compute.losses import loss_sum


@dataclass(frozen=True)
class DatumResult:
    """Result of one datum.

    Attributes:
        logprobs: float32, shaped like its `target_tokens`.
        loss: Its loss.
    """

    logprobs: np.ndarray
    loss: float


def target_logprobs(model: Any, head: HeadLayer, tokens: Tensor, targets: Tensor) -> Tensor:
    """Compute the logprobs of target tokens after each position of a sequence.

    Args:
        model: A Hugging Face causal language model, possibly with LoRA layers in it.
        head: Its head.
        tokens: int64 `(N,)`.
        targets: int64 `(N,)` or `(N, K)`; row i are candidates for the token after position i.

    Returns:
        float32, shaped like `targets`; logits and log-softmax are float32.
    """
    hidden: Tensor = model.model(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
    logits = differentiable_product(hidden, head.module.weight)
    if head.lora_a is not None and head.lora_b is not None:
        logits = logits + linear(linear(hidden.float(), head.lora_a), head.lora_b) * head.scaling
    chosen = logits.log_softmax(dim=1).gather(1, targets.reshape(len(targets), -1))
    return chosen.reshape(targets.shape)


def compute_datum(
    model: Any,
    head: HeadLayer,
    parameters: Sequence[torch.nn.Parameter],
    datum: Datum,
    loss_fn: LossFn,
    gradients: Sequence[Tensor] | None,
    device: torch.device,
) -> DatumResult:
    """Compute loss and logprobs of one datum.

    Args:
        model: The language model with the right adapter active.
        head: Its head.
        parameters: The parameters that need gradients.
        datum: The datum.
        loss_fn: The loss.
        gradients: One buffer per parameter, to which the gradients are added; None computes no
            gradients and builds no graph.
        device: Device of the model.
    """
    tokens = torch.from_numpy(np.array(datum.tokens)).to(device)
    inputs = {k: torch.from_numpy(np.array(v)).to(device) for k, v in datum.loss_fn_inputs.items()}
    with torch.set_grad_enabled(gradients is not None):
        logprobs = target_logprobs(model, head, tokens, inputs["target_tokens"])
        loss = loss_sum(loss_fn, logprobs, inputs)
    if gradients is not None:
        found = torch.autograd.grad(loss, list(parameters), allow_unused=True)
        for buffer, gradient in zip(gradients, found, strict=True):
            if gradient is not None:
                buffer += gradient
    return DatumResult(logprobs.detach().float().cpu().numpy(), float(loss.detach()))
