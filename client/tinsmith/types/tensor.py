"""Arrays that go in and out: numpy inside, torch at the edges where the caller uses torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from tinsmith.errors import InvalidArgumentError

if TYPE_CHECKING:
    import torch

TensorDtype = Literal["int64", "float32"]
Like = Literal["", "numpy", "torch"]

_LIST_DTYPES: dict[str, TensorDtype] = {
    "target_tokens": "int64",
    "weights": "float32",
    "advantages": "float32",
    "logprobs": "float32",
    "sequence_ratio_mask": "float32",
    "clip_low_threshold": "float32",
    "clip_high_threshold": "float32",
}


class TensorData:
    """A dense array of float32 or int64 values.

    Args:
        data: Values: an array, or a flat or nested list.
        dtype: "float32" or "int64"; None takes the kind of `data`.
        shape: None takes the shape of `data`.

    Raises:
        InvalidArgumentError: The values are ragged, of another kind, or do not fill `shape`.
    """

    __slots__ = ("_array", "like")

    def __init__(
        self,
        data: Sequence[Any] | NDArray[Any],
        dtype: TensorDtype | None = None,
        shape: Sequence[int] | None = None,
    ) -> None:
        self._array = _to_array(data, dtype)
        if shape is not None:
            try:
                self._array = self._array.reshape(tuple(shape))
            except ValueError as error:
                raise InvalidArgumentError(f"shape: {error}", field="shape") from None
        self.like: Like = ""
        """What the caller works with; results for it come back as the same."""

    @classmethod
    def from_numpy(cls, array: NDArray[Any]) -> TensorData:
        """From an array of a float or signed integer dtype."""
        tensor = cls(array)
        tensor.like = "numpy"
        return tensor

    @classmethod
    def from_torch(cls, tensor: torch.Tensor) -> TensorData:
        """From a tensor of a float or signed integer dtype, on any device; bfloat16 too."""
        plain = tensor.detach().cpu()
        data = cls(plain.float().numpy() if plain.is_floating_point() else plain.numpy())
        data.like = "torch"
        return data

    @property
    def dtype(self) -> TensorDtype:
        """ "float32" or "int64"."""
        return "float32" if self._array.dtype.kind == "f" else "int64"

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each dimension."""
        return self._array.shape

    @property
    def data(self) -> list[Any]:
        """The values as one flat list."""
        flat: list[Any] = self._array.ravel().tolist()
        return flat

    def to_numpy(self) -> NDArray[Any]:
        """The values as float32 or int64 array; it may not be written to."""
        return self._array

    def to_torch(self) -> torch.Tensor:
        """The values as a tensor of its own memory."""
        import torch

        return torch.from_numpy(self._array.copy())

    def tolist(self) -> list[Any]:
        """The values as nested lists."""
        nested: list[Any] = self._array.tolist()
        return nested

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self._array, dtype=dtype, copy=copy)  # type: ignore[call-overload, no-any-return]

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: Any) -> Any:
        return self._array[index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorData):
            return NotImplemented
        return self.dtype == other.dtype and np.array_equal(self._array, other._array)

    __hash__ = None  # type: ignore[assignment]  # it is a mutable value's view

    def __repr__(self) -> str:
        return f"TensorData({self._array!r})"

    def __reduce__(self) -> Any:
        return _rebuild, (self._array, self.like)


def _rebuild(array: NDArray[Any], like: Like) -> TensorData:
    tensor = TensorData(array)
    tensor.like = like
    return tensor


def _to_array(data: Any, dtype: TensorDtype | None) -> NDArray[Any]:
    try:
        array = np.asarray(data)
    except ValueError:
        raise InvalidArgumentError("data: rows have different lengths", field="data") from None
    if array.size == 0 and not isinstance(data, np.ndarray):
        array = array.astype(dtype or np.float32)
    if array.dtype.kind not in "fi":
        message = f"dtype: {array.dtype} is neither float nor signed integer"
        raise InvalidArgumentError(message, field="dtype")
    kind = dtype or ("float32" if array.dtype.kind == "f" else "int64")
    if kind not in ("float32", "int64"):
        raise InvalidArgumentError(f"dtype: {kind!r} is not float32 or int64", field="dtype")
    if kind == "int64" and array.dtype.kind == "f" and not np.array_equal(array, np.trunc(array)):
        raise InvalidArgumentError("dtype: the values are not whole numbers", field="dtype")
    array = array.astype(kind, copy=isinstance(data, np.ndarray))
    array.flags.writeable = False
    return array


def from_any(name: str, value: Any) -> TensorData:
    """Read one of a datum's `loss_fn_inputs`.

    Args:
        name: Its name, which says the dtype where the value is a plain list.
        value: TensorData, numpy array, torch tensor or list.
    """
    if isinstance(value, TensorData):
        return value
    if isinstance(value, np.ndarray):
        return TensorData.from_numpy(value)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return TensorData.from_torch(value)
    if name not in _LIST_DTYPES:
        raise KeyError(f"{name}: a plain list needs a known name; pass an array or TensorData")
    return TensorData(value, _LIST_DTYPES[name])


class NumpyTensor(np.ndarray[Any, Any]):
    """A result for a caller who works with numpy: an array that also converts."""

    def to_numpy(self) -> NDArray[Any]:
        """As a plain array."""
        return self.view(np.ndarray)

    def to_torch(self) -> torch.Tensor:
        """As a tensor of its own memory."""
        import torch

        return torch.from_numpy(np.array(self))


def as_like(array: NDArray[Any], like: Like) -> Any:
    """A result in the form that the caller works with."""
    if like == "numpy":
        return np.array(array).view(NumpyTensor)
    if like == "torch":
        from tinsmith.types._torch_tensor import TorchTensor

        return TorchTensor.of(array)
    return TensorData(array)
