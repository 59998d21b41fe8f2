"""The built-in losses, as functions of one datum's logprobs. Every loss is a sum.

Symbols: `lp` the model's logprobs of the target tokens, `q` the input `logprobs`, `A` the input
`advantages`, `r = exp(lp - q)`; all of shape `(N,)`, for cross-entropy also `(N, K)`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinsmithd.loss_fns import (
    Cispo,
    CrossEntropy,
    Dro,
    Gspo,
    ImportanceSampling,
    LossFn,
    Ppo,
)

LOG_RATIO_MAX = 80.0
"""Largest logarithm of a ratio: beyond it float32 would overflow and turn 0 * inf into NaN."""

SEQUENCE_RATIO = "sequence_ratio"
"""Input of a sequence-wise loss: for each token the ratio of its whole sequence."""


def is_sequence_wise(loss_fn: LossFn) -> bool:
    """Whether a token's loss depends on the other tokens of its datum."""
    return isinstance(loss_fn, Gspo)


def may_have_gradient(loss_fn: LossFn, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Positions at which a loss may have a gradient, as far as its inputs alone say.

    Args:
        loss_fn: The loss.
        inputs: Its inputs, each `(T, K)`.

    Returns:
        bool `(T,)`; elsewhere the gradient is 0 for sure.
    """
    if isinstance(loss_fn, Dro):  # it pulls towards the sampled logprobs wherever there are some
        return np.ones(len(inputs["target_tokens"]), bool)
    factor = "weights" if isinstance(loss_fn, CrossEntropy) else "advantages"
    wanted: np.ndarray = (inputs[factor] != 0).any(1)
    return wanted


def sequence_ratios(
    lp: Tensor, inputs: Mapping[str, Tensor], segment_lengths: Sequence[int]
) -> Tensor:
    """The ratio of each token's sequence, for some data in a row.

    Args:
        lp: `(T, 1)` logprobs of the target tokens.
        inputs: Inputs of the loss, each `(T, 1)`.
        segment_lengths: Number of tokens of each datum, T in all.

    Returns:
        `(T, 1)`, without a graph.
    """
    mask = (inputs["sequence_ratio_mask"] != 0).to(lp.dtype)
    distance = (lp.detach() - inputs["logprobs"]) * mask
    lengths = list(segment_lengths)
    parts = zip(torch.split(distance, lengths), torch.split(mask, lengths), strict=True)
    ratios = [_sequence_ratio(d, m).expand(len(d), 1) for d, m in parts]
    return torch.cat(ratios)


def loss_sum(loss_fn: LossFn, lp: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """The loss of one datum, or of some tokens of any data.

    Args:
        loss_fn: The loss with its settings.
        lp: Logprobs of the target tokens, `(N,)` or `(N, K)`, with their graph.
        inputs: The `loss_fn_inputs` of these tokens, of the same shape. A sequence-wise loss needs
            either all tokens of one datum, or `SEQUENCE_RATIO` among the inputs.

    Returns:
        A scalar whose gradient with respect to `lp` is the loss's.
    """
    return _FUNCTIONS[type(loss_fn)](loss_fn, lp, inputs)


def _cross_entropy(_: CrossEntropy, lp: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """`sum(-lp * weights)`."""
    return -(lp * inputs["weights"]).sum()


def _importance_sampling(_: ImportanceSampling, lp: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """`-sum(r * A)`."""
    return -(_ratio(lp, inputs["logprobs"]) * inputs["advantages"]).sum()


def _ppo(loss_fn: Ppo, lp: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """`-sum(min(r * A, clip(r, low, high) * A))` (Schulman et al. 2017, eq. 7)."""
    return _clipped(_ratio(lp, inputs["logprobs"]), inputs["advantages"], loss_fn)


def _cispo(loss_fn: Cispo, lp: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """`-sum(stop_gradient(clip(r, low, high)) * lp * A)` (MiniMax-M1 2025, eq. 4)."""
    ratio = _ratio(lp.detach(), inputs["logprobs"])
    clipped = ratio.clamp(loss_fn.clip_low_threshold, loss_fn.clip_high_threshold)
    return -(clipped * lp * inputs["advantages"]).sum()


def _dro(loss_fn: Dro, lp: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """`-sum(lp * A - beta / 2 * (lp - q)**2)` (Richemond et al. 2024)."""
    distance = lp - inputs["logprobs"]
    return -(lp * inputs["advantages"] - 0.5 * loss_fn.beta * distance.square()).sum()


def _gspo(loss_fn: Gspo, lp: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """PPO with the sequence's ratio (Zheng et al. 2025, the token form of section 4.3)."""
    if SEQUENCE_RATIO in inputs:
        sequence_ratio = inputs[SEQUENCE_RATIO]
    else:
        mask = (inputs["sequence_ratio_mask"] != 0).to(lp.dtype)
        sequence_ratio = _sequence_ratio((lp.detach() - inputs["logprobs"]) * mask, mask)
    # The value of the sequence's ratio with the gradient of the token's own logprob.
    return _clipped(sequence_ratio * (lp - lp.detach()).exp(), inputs["advantages"], loss_fn)


def _sequence_ratio(distance: Tensor, mask: Tensor) -> Tensor:
    return (distance.sum() / mask.sum().clamp(min=1)).clamp(max=LOG_RATIO_MAX).exp()


def _ratio(lp: Tensor, q: Tensor) -> Tensor:
    return (lp - q).clamp(max=LOG_RATIO_MAX).exp()


def _clipped(ratio: Tensor, advantages: Tensor, loss_fn: Ppo | Gspo) -> Tensor:
    clipped = ratio.clamp(loss_fn.clip_low_threshold, loss_fn.clip_high_threshold)
    return -torch.minimum(ratio * advantages, clipped * advantages).sum()


_FUNCTIONS: Mapping[type[LossFn], Callable[[Any, Tensor, Mapping[str, Tensor]], Tensor]] = {
    CrossEntropy: _cross_entropy,
    ImportanceSampling: _importance_sampling,
    Ppo: _ppo,
    Cispo: _cispo,
    Dro: _dro,
    Gspo: _gspo,
}
