"""Turns numpy arrays into `tinsmith.v1.Tensor` messages and back.

    tensor = tensors.encode(np.array([1, 2, 3]))
    array = tensors.decode(tensor)

Floating-point arrays travel as float32, integer arrays as int64 (int32 stays int32), as
little-endian bytes. `plain=True` writes numbers that a person can read in grpcurl instead.
"""

import math
import sys
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tinsmith.v1 import types_pb2 as pb

_DTYPES: dict[int, np.dtype[Any]] = {
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_INT64: np.dtype("<i8"),
    pb.DTYPE_INT32: np.dtype("<i4"),
}


DIMENSIONS_MAX = 64
"""Maximum number of dimensions of a numpy array. A server takes fewer."""
PLAIN_STEP = 16_384
"""Plain numbers that are written at once: other threads have turns in between."""


class TensorError(ValueError):
    """A Tensor message contradicts itself.

    Attributes:
        kind: "shape", "dtype" or "value": which part is wrong.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def encode(values: ArrayLike, *, plain: bool = False) -> pb.Tensor:
    """Write an array as a message; arguments and errors as `write`."""
    tensor = pb.Tensor()
    write(tensor, values, plain=plain)
    return tensor


def write(tensor: pb.Tensor, values: ArrayLike, *, plain: bool = False) -> None:
    """Write an array into an empty message, such as one that is a field of another message.

    A message that is given to another one is copied with all its bytes; one that is filled in its
    place is not: `write(datum.loss_fn_inputs["weights"], weights)`.

    Args:
        tensor: Where to.
        values: Array, or nested lists, of a float or integer dtype and any shape.
        plain: Carry the values as plain numbers instead of bytes.

    Raises:
        TensorError: The dtype is neither float nor integer, or the array is ragged.
    """
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise TensorError("shape", "rows have different lengths") from error
    if array.dtype.kind == "f":
        code = pb.DTYPE_FLOAT32
    elif array.dtype == np.int32:
        code = pb.DTYPE_INT32
    elif array.dtype.kind in "iu":
        code = pb.DTYPE_INT64
    else:
        raise TensorError("dtype", f"cannot send dtype {array.dtype}; use a float or an int")
    packed = np.ascontiguousarray(array, dtype=_DTYPES[code])
    tensor.dtype = code
    tensor.shape.extend(array.shape)
    if not plain:
        tensor.data = packed.tobytes()
        return
    numbers = tensor.floats if code == pb.DTYPE_FLOAT32 else tensor.ints
    flat = packed.ravel()
    for start in range(0, flat.size, PLAIN_STEP):
        numbers.extend(flat[start : start + PLAIN_STEP].tolist())


def decode(tensor: pb.Tensor) -> NDArray[Any]:
    """Read a message as an array: float32, int64 or int32, read-only where no copy was needed.

    Raises:
        TensorError: Shape, dtype and values do not agree.
    """
    data = tensor.data
    filled = bool(data) + bool(tensor.floats) + bool(tensor.ints)
    if filled > 1:
        raise TensorError("value", "set only one of data, floats and ints")
    if tensor.floats:
        if tensor.dtype not in (pb.DTYPE_UNSPECIFIED, pb.DTYPE_FLOAT32):
            raise TensorError("dtype", "floats need dtype FLOAT32")
        flat: NDArray[Any] = np.array(tensor.floats, dtype=np.float32)
    elif tensor.ints:
        if tensor.dtype not in (pb.DTYPE_UNSPECIFIED, pb.DTYPE_INT64, pb.DTYPE_INT32):
            raise TensorError("dtype", "ints need dtype INT64 or INT32")
        flat = np.array(tensor.ints, dtype=np.int64)
        if tensor.dtype == pb.DTYPE_INT32 and (flat.astype(np.int32) != flat).any():
            raise TensorError("value", "a number is outside INT32")
    else:
        flat = _from_bytes(tensor.dtype, data)
    # Before the numbers are multiplied: a product of thousands takes seconds.
    if len(tensor.shape) > DIMENSIONS_MAX:
        raise TensorError("shape", f"{len(tensor.shape)} dimensions, at most {DIMENSIONS_MAX}")
    shape = tuple(tensor.shape)
    if not shape:
        return flat
    text = f"shape {list(shape)} does not hold {flat.size} values"
    if any(n < 0 for n in shape) or math.prod(shape) != flat.size:
        raise TensorError("shape", text)
    try:
        return flat.reshape(shape)
    except ValueError as error:  # no values, and sides that are too long for numpy all the same
        raise TensorError("shape", text) from error


def _from_bytes(code: int, data: bytes) -> NDArray[Any]:
    if code == pb.DTYPE_UNSPECIFIED and not data:
        return np.zeros(0, dtype=np.float32)
    dtype = _DTYPES.get(code)
    if dtype is None:
        raise TensorError("dtype", "data needs dtype FLOAT32, INT64 or INT32")
    if len(data) % dtype.itemsize:
        raise TensorError(
            "shape", f"{len(data)} bytes are not a whole number of {dtype.itemsize}-byte values"
        )
    array = np.frombuffer(data, dtype=dtype)
    return array if sys.byteorder == "little" else array.astype(dtype.newbyteorder("="))
