"""The parts of AdamW that all engines share: clipping by the global norm, and a smallest eps."""

from tinsmithd.domain import AdamParams

CLIP_EPS = 1e-6
"""Added to the norm before dividing by it, as torch.nn.utils.clip_grad_norm_ does."""

EPS_MIN = 1e-30
"""Stands for an eps of 0, with which a gradient of 0 would be divided by 0."""


def clip_scale(norm: float, adam: AdamParams) -> float:
    """Factor on the gradients; at most 1.

    Args:
        norm: Their global L2 norm.
        adam: Settings of the step.
    """
    if adam.grad_clip_norm <= 0:
        return 1.0
    return min(1.0, adam.grad_clip_norm / (norm + CLIP_EPS))


def eps_of(adam: AdamParams) -> float:
    """The eps of a step; never 0."""
    return max(adam.eps, EPS_MIN)
