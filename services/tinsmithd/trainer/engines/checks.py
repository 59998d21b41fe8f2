"""Refusals that all engines share."""

from collections.abc import Mapping, Sequence

import numpy as np

from tinsmithd.domain import MOMENTS, ModelState, Tuning
from tinsmithd.errors import FailedPrecondition, Reason
from tinsmithd.modeling.trained import check_same_shape


def non_finite_gradient() -> FailedPrecondition:
    """The error of a step whose gradients, or their norm, are NaN or infinite."""
    return FailedPrecondition(
        "a pending gradient, or the norm of them all, is NaN or infinite; the gradients were "
        "cleared, weights are unchanged",
        Reason.NON_FINITE_GRADIENT,
    )


def check_state(
    tuning: Tuning,
    shapes: Mapping[str, Sequence[int]],
    state: ModelState,
    *,
    optimizer: bool,
) -> Mapping[str, Mapping[str, np.ndarray]] | None:
    """Refuse a state that does not fit a model, before anything is changed.

    Args:
        tuning: Tuning of the model.
        shapes: Shapes of its parameters, by name.
        state: The state to load.
        optimizer: Whether to load its optimizer state, too.

    Returns:
        With `optimizer`, the moments by kind and name; None without, or where no step was made.

    Raises:
        FailedPrecondition: The state does not fit (INCOMPATIBLE_CHECKPOINT).
    """
    if message := tuning.mismatch(state.tuning):
        raise FailedPrecondition(message, Reason.INCOMPATIBLE_CHECKPOINT)
    check_same_shape(shapes, state.weights)
    if not optimizer or not state.optimizer:
        return None
    moments = {
        kind: {
            name.removeprefix(f"{kind}."): array
            for name, array in state.optimizer.items()
            if name.startswith(f"{kind}.")
        }
        for kind in MOMENTS
    }
    for arrays in moments.values():
        check_same_shape(shapes, arrays)
    return moments
