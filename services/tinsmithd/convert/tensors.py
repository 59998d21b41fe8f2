"""Tensors on the wire to numpy and back."""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tinsmith import tensors
from tinsmith.v1 import types_pb2 as pb
from tinsmithd.errors import InvalidArgument, Reason

_REASONS = {
    "shape": Reason.INVALID_SHAPE,
    "dtype": Reason.INVALID_DTYPE,
    "value": Reason.INVALID_FIELD,
}


def array_from_pb(message: pb.Tensor, field: str, kind: Literal["float", "int"]) -> NDArray[Any]:
    """Read a tensor as float32 or int64, whatever width it was sent in.

    Plain `ints` are taken where floats are wanted, since a person types 1 and not 1.0.

    Raises:
        InvalidArgument: It contradicts itself or has the wrong kind of dtype.
    """
    try:
        array = tensors.decode(message)
    except tensors.TensorError as error:
        raise InvalidArgument(field, str(error), _REASONS[error.kind]) from error
    if kind == "float":
        if array.dtype.kind == "i" and (message.data or not array.size):
            raise InvalidArgument(
                field, f"dtype {array.dtype}, expected float32", Reason.INVALID_DTYPE
            )
        return array.astype(np.float32, copy=False)
    if array.dtype.kind == "f" and array.size:
        raise InvalidArgument(field, f"dtype {array.dtype}, expected int64", Reason.INVALID_DTYPE)
    return array.astype(np.int64, copy=False)


def array_to_pb(array: NDArray[Any], tensor_format: int) -> pb.Tensor:
    """Write an array in the format that the caller asked for."""
    return tensors.encode(array, plain=tensor_format == pb.TENSOR_FORMAT_PLAIN)


def check_format(value: int, field: str) -> None:
    """Refuse a TensorFormat that this server does not know."""
    if value not in pb.TensorFormat.values():
        raise InvalidArgument(field, f"unknown format {value}")
