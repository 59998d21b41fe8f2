"""Checks a datum against the base model, the loss and the limits, before a call is queued."""

import numpy as np

from tinsmithd.domain import BaseModelInfo, CrossEntropy, Datum, LossFn
from tinsmithd.errors import InvalidArgument, Reason


def check_datum(
    field: str, datum: Datum, loss_fn: LossFn, info: BaseModelInfo, targets_max: int
) -> None:
    """Refuse a datum on which the model cannot train.

    Raises:
        InvalidArgument: Naming the field, such as `data[3].loss_fn_inputs["weights"]`.
    """
    count = len(datum.tokens)
    if count > info.context_length:
        raise InvalidArgument(
            f"{field}.model_input",
            f"{count} tokens, context_length is {info.context_length}",
            Reason.LIMIT_EXCEEDED,
            metadata={
                "limit": "context_length",
                "value": str(count),
                "allowed": str(info.context_length),
            },
        )
    check_tokens(f"{field}.model_input", datum.tokens, info.vocab_size)
    for name in sorted(datum.loss_fn_inputs):
        if name not in loss_fn.inputs:
            known = ", ".join(loss_fn.inputs)
            raise InvalidArgument(
                _input(field, name), f"{loss_fn.name} reads {known}", Reason.UNKNOWN_LOSS_INPUT
            )
    for name in loss_fn.inputs:
        if name not in datum.loss_fn_inputs:
            message = f"{loss_fn.name} needs it"
            raise InvalidArgument(_input(field, name), message, Reason.MISSING_FIELD)
    targets = datum.loss_fn_inputs["target_tokens"]
    _check_targets(_input(field, "target_tokens"), targets, count, loss_fn, targets_max)
    check_tokens(_input(field, "target_tokens"), targets, info.vocab_size)
    for name in loss_fn.inputs[1:]:
        array = datum.loss_fn_inputs[name]
        if array.shape != targets.shape:
            message = f"shape {list(array.shape)}, expected {list(targets.shape)}"
            raise InvalidArgument(_input(field, name), message, Reason.INVALID_SHAPE)
        if not np.isfinite(array).all():
            at = np.argwhere(~np.isfinite(array))[0].tolist()
            message = f"value at {at} is not finite"
            raise InvalidArgument(_input(field, name), message, Reason.NON_FINITE)


def _check_targets(
    field: str, targets: np.ndarray, count: int, loss_fn: LossFn, targets_max: int
) -> None:
    wide = isinstance(loss_fn, CrossEntropy) and targets.ndim == 2
    if targets.shape[:1] != (count,) or not (targets.ndim == 1 or wide):
        expected = f"[{count}]" + (f" or [{count}, K]" if isinstance(loss_fn, CrossEntropy) else "")
        message = f"shape {list(targets.shape)}, expected {expected}"
        raise InvalidArgument(field, message, Reason.INVALID_SHAPE)
    if wide and not 1 <= targets.shape[1] <= targets_max:
        raise InvalidArgument(
            field,
            f"{targets.shape[1]} targets per position, expected 1 to {targets_max}",
            Reason.LIMIT_EXCEEDED,
            metadata={
                "limit": "targets_per_position_max",
                "value": str(targets.shape[1]),
                "allowed": str(targets_max),
            },
        )


def check_tokens(field: str, tokens: np.ndarray, vocab_size: int) -> None:
    """Refuse token ids outside the vocabulary."""
    outside = (tokens < 0) | (tokens >= vocab_size)
    if outside.any():
        at = np.argwhere(outside)[0]
        raise InvalidArgument(
            field,
            f"token {tokens[tuple(at)]} at {at.tolist()} is not in [0, {vocab_size})",
            Reason.TOKEN_OUT_OF_RANGE,
        )


def _input(field: str, name: str) -> str:
    return f'{field}.loss_fn_inputs["{name}"]'
