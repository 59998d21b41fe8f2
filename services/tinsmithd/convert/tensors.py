"""Tensors on the wire to numpy and back."""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tinsmith import tensors
from tinsmith.v1 import types_pb2 as pb
from tinsmithd.errors import InvalidArgument, Reason

DIMENSIONS_MAX = 2
_FORMATS = frozenset(pb.TensorFormat.values())
_REASONS = {
    "shape": Reason.INVALID_SHAPE,
    "dtype": Reason.INVALID_DTYPE,
    "value": Reason.INVALID_FIELD,
}


def array_from_pb(message: pb.Tensor, field: str, kind: Literal["float", "int"]) -> NDArray[Any]:
    """Read a tensor as float32 or int64, whatever width it was sent in.

    What is wanted depends on the name of the input alone, so integers are taken where floats are
    wanted, if float32 holds each of them exactly: weights and masks are often integers.

    Raises:
        InvalidArgument: It contradicts itself, or cannot be converted exactly.
    """
    if len(message.shape) > DIMENSIONS_MAX:  # before anything is computed from them
        text = f"{len(message.shape)} dimensions, at most {DIMENSIONS_MAX}"
        raise InvalidArgument(field, text, Reason.INVALID_SHAPE)
    try:
        array = tensors.decode(message)
    except tensors.TensorError as error:
        raise InvalidArgument(field, str(error), _REASONS[error.kind]) from error
    if kind == "int":
        if array.dtype.kind == "f" and array.size:
            text = f"dtype {array.dtype}, expected int64"
            raise InvalidArgument(field, text, Reason.INVALID_DTYPE)
        return array.astype(np.int64, copy=False)
    if array.dtype.kind == "f":
        return array
    floats = array.astype(np.float32)
    inside = np.abs(floats) < 2.0**63  # what can be compared as an integer
    exact = inside & (np.where(inside, floats, 0).astype(np.int64) == array)
    if not exact.all():
        at = np.argwhere(~exact)[0]
        raise InvalidArgument(field, f"{array[tuple(at)]} at {at.tolist()} is not exact in float32")
    return floats


def write_array(message: pb.Tensor, array: NDArray[Any], tensor_format: int) -> None:
    """Write an array into an empty message, in the format that the caller asked for."""
    tensors.write(message, array, plain=tensor_format == pb.TENSOR_FORMAT_PLAIN)


def check_format(value: int, field: str) -> None:
    """Refuse a TensorFormat that this server does not know.

    Raises:
        InvalidArgument: Naming the field.
    """
    if value not in _FORMATS:
        raise InvalidArgument(field, f"unknown format {value}")
