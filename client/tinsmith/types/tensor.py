"""Arrays that go in and out: numpy inside, torch where the caller computes with torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from tinsmith._check import INT64_MAX, real, refuse, shown
from tinsmith.errors import UnknownInputError
from tinsmith.types._arithmetic import Arithmetic
from tinsmith.types._sparse import compressed, dense
from tinsmith.types._values import equal, is_torch

if TYPE_CHECKING:
    import torch

TensorDtype = Literal["int64", "float32"]

_DTYPES: dict[str, TensorDtype] = {
    "target_tokens": "int64",
    "weights": "float32",
    "advantages": "float32",
    "logprobs": "float32",
    "sequence_ratio_mask": "float32",
    "clip_low_threshold": "float32",
    "clip_high_threshold": "float32",
}
"""What the losses read each of their inputs as, whatever it is given as."""


class TensorData(Arithmetic):
    """An array of float32 or int64 values, with memory of its own.

    It is what results hold, too. numpy's and torch's functions take it, and operators work as on a
    numpy array, or beside a torch tensor as on one.

    Args:
        data: Values: an array, a tensor, or a flat or nested list. They are copied.
        dtype: "float32" or "int64"; None takes the kind of `data`. Integers and booleans convert
            exactly or are refused, floats are rounded to float32 as numpy does.
        shape: None takes the shape of `data`.
        sparse_crow_indices: With these two, `data` are the values of a sparse array of this `shape`
            (CSR): for each row where its values begin, and their number at the end.
        sparse_col_indices: The column of each value.

    Raises:
        InvalidArgumentError: The values are ragged, of another kind, do not fit the dtype, do not
            fill `shape`, or contradict the indices.
    """

    __slots__ = ("_array", "_empty", "_is_sparse")

    def __init__(
        self,
        data: Sequence[Any] | NDArray[Any] | torch.Tensor,
        dtype: TensorDtype | None = None,
        shape: Sequence[int] | None = None,
        sparse_crow_indices: Sequence[int] | None = None,
        sparse_col_indices: Sequence[int] | None = None,
    ) -> None:
        self._array = _own(data, dtype, "data")
        self._empty: NDArray[np.bool_] | None = None
        """Cells that a sparse array had no value for; the array is 0 there."""
        self._is_sparse = sparse_crow_indices is not None or sparse_col_indices is not None
        if self._is_sparse:
            self._array, self._empty = dense(
                self._array, sparse_crow_indices, sparse_col_indices, shape
            )
            self._array.flags.writeable = False
        elif shape is not None:
            try:
                self._array = self._array.reshape(tuple(shape))
            except (TypeError, ValueError) as error:
                raise refuse("shape", str(error), "INVALID_SHAPE") from None

    @classmethod
    def from_numpy(cls, array: NDArray[Any]) -> TensorData:
        """Make a tensor of an array of a float, integer or boolean dtype."""
        return cls(array)

    @classmethod
    def from_torch(cls, tensor: torch.Tensor) -> TensorData:
        """Make one of a torch tensor of a float, integer or boolean dtype, on any device."""
        return cls(tensor)

    @classmethod
    def from_torch_sparse(cls, tensor: torch.Tensor, pad_value: float = 0) -> TensorData:
        """As `from_torch`; the cells of a matrix that are `pad_value` are empty.

        An empty cell is what `to_numpy` and `to_torch` say it is, else 0.
        """
        data = cls.from_torch(tensor)
        if data._array.ndim == 2:
            data._empty = data._array == _pad(pad_value, data.dtype)
            data._array = np.where(data._empty, data._array.dtype.type(0), data._array)
            data._array.flags.writeable = False
            values = data._array.size - int(data._empty.sum())
            data._is_sparse = len(data._array) + 1 + 2 * values < data._array.size
        return data

    @classmethod
    def model_validate(cls, obj: object) -> TensorData:
        """Make one of a mapping of the arguments; one of this type is taken as it is."""
        if isinstance(obj, cls):
            return obj
        if not isinstance(obj, Mapping):
            raise refuse("TensorData", f"expected a mapping, got {shown(obj)}")
        return cls(**obj)

    def model_dump(self, *, exclude_none: bool = False, **_: Any) -> dict[str, Any]:
        """The arguments that make it, as lists and numbers."""
        names = ("data", "dtype", "shape", "sparse_crow_indices", "sparse_col_indices")
        given = {name: getattr(self, name) for name in names}
        return {
            name: value
            for name, value in given.items()
            if value is not None or not (exclude_none or name.startswith("sparse"))
        }

    @property
    def dtype(self) -> TensorDtype:
        """ "float32" or "int64"."""
        return "float32" if self._array.dtype.kind == "f" else "int64"

    @property
    def shape(self) -> list[int]:
        """Length of each dimension."""
        return list(self._array.shape)

    @property
    def data(self) -> list[Any]:
        """The values as one flat list; those of a sparse array without its empty cells."""
        array = self._array
        kept = array[~self._empty] if self._is_sparse and self._empty is not None else array
        flat: list[Any] = kept.ravel().tolist()
        return flat

    @property
    def sparse_crow_indices(self) -> list[int] | None:
        """Of a sparse array where the values of each row begin, and their number; else None."""
        return self._indices()[0]

    @property
    def sparse_col_indices(self) -> list[int] | None:
        """Of a sparse array the column of each value; else None."""
        return self._indices()[1]

    def _indices(self) -> tuple[list[int], list[int]] | tuple[None, None]:
        if not self._is_sparse or self._empty is None:
            return None, None
        return compressed(self._empty)

    def view(self) -> NDArray[Any]:
        """The values as float32 or int64 array, which may not be written to; copies nothing."""
        return self._array

    def to_numpy(self, pad_value: float = 0) -> NDArray[Any]:
        """The values as float32 or int64 array of its own memory.

        Args:
            pad_value: What stands in the empty cells of an array that was sparse.
        """
        pad = _pad(pad_value, self.dtype)
        if self._empty is None or pad == 0:
            return self._array.copy()
        padded: NDArray[Any] = np.where(self._empty, self._array.dtype.type(pad), self._array)
        return padded

    def to_torch(self, pad_value: float = 0) -> torch.Tensor:
        """The values as a tensor of its own memory; `pad_value` as in `to_numpy`."""
        import torch

        return torch.from_numpy(self.to_numpy(pad_value))

    def tolist(self, pad_value: float = 0) -> list[Any]:
        """The values as nested lists; `pad_value` as in `to_numpy`."""
        nested: list[Any] = self.to_numpy(pad_value).tolist()
        return nested

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        copied = True if copy is None else copy  # what it is read into may be written to
        return np.array(self._array, dtype=dtype, copy=copied)  # type: ignore[call-overload, no-any-return]

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: Any) -> Any:
        return self._array[index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorData):
            return NotImplemented
        same = self.dtype == other.dtype and equal(self._array, other._array)
        return same and equal(self._empty, other._empty)

    __hash__ = None  # type: ignore[assignment]  # like a list's: it is compared by its content

    def __repr__(self) -> str:
        return f"TensorData({self._array!r})"

    def __reduce__(self) -> Any:
        return _rebuild, (self._array, self._empty, self._is_sparse)


def _rebuild(
    array: NDArray[Any], empty: NDArray[np.bool_] | None = None, is_sparse: bool = False
) -> TensorData:
    """One of an array that may not be written to; nothing is copied."""
    tensor = TensorData.__new__(TensorData)
    tensor._array, tensor._empty, tensor._is_sparse = array, empty, is_sparse
    return tensor


def _pad(pad_value: float, dtype: TensorDtype) -> float:
    """What stands in empty cells, as a value of that dtype."""
    number = real(pad_value, "pad_value")
    if dtype == "int64" and not number.is_integer():
        raise refuse("pad_value", f"{number} is no int64")
    return number


# --- reading what callers have ----------------------------------------------------------------


def _own(data: Any, dtype: TensorDtype | None, field: str) -> NDArray[Any]:
    """A copy of anything that is numbers, as float32 or int64, which may not be written to."""
    if dtype not in (None, "float32", "int64"):
        raise refuse("dtype", f"{shown(dtype)} is not float32 or int64", "INVALID_DTYPE")
    array = _copied(data, field)
    if not array.size and not hasattr(data, "dtype"):
        array = array.astype(dtype or np.float32)  # an empty list has no dtype of its own
    array = _exactly(array, dtype or ("float32" if array.dtype.kind in "fV" else "int64"), field)
    array.flags.writeable = False
    return array


def _copied(data: Any, field: str) -> NDArray[Any]:
    if np.ma.is_masked(data):
        raise refuse(field, "masked values cannot be sent")
    try:
        if is_torch(data):
            return _from_torch(data)
        if isinstance(data, list | tuple) and data and is_torch(data[0]):
            data = [_from_torch(entry) if is_torch(entry) else entry for entry in data]
        return np.array(data, copy=True)
    except ValueError:
        raise refuse(field, "rows have different lengths", "INVALID_SHAPE") from None
    except (TypeError, RuntimeError, OverflowError) as error:
        raise refuse(field, f"cannot be read as an array: {shown(str(error))}") from None


def _from_torch(tensor: Any) -> NDArray[Any]:
    """A copy; of any device and layout, bfloat16 as float32."""
    plain = tensor.detach()
    plain = (plain if str(plain.layout) == "torch.strided" else plain.to_dense()).cpu()
    if plain.is_floating_point() and plain.element_size() < 4:
        plain = plain.float()
    array: NDArray[Any] = np.array(plain.numpy(), copy=True)
    return array


def _exactly(array: NDArray[Any], dtype: TensorDtype, field: str) -> NDArray[Any]:
    kind = array.dtype.kind
    if kind == "V" and "float" in array.dtype.name:  # bfloat16 and others that numpy only carries
        array, kind = array.astype(np.float32), "f"
    if kind not in "biuf":
        why = f"expected numbers, got {shown(array.dtype.name)}"
        raise refuse(field, why, "INVALID_DTYPE")
    if array.dtype == dtype:
        return array
    if kind == "b":
        return array.astype(dtype)
    with np.errstate(all="ignore"):
        converted = array.astype(dtype)
        if kind == "f" and dtype == "float32":
            fits = np.isfinite(converted) == np.isfinite(array)
        elif kind == "f":
            fits = (converted == array) & (array >= -(2.0**63)) & (array < 2.0**63)
        elif dtype == "int64":
            fits = array <= INT64_MAX
        else:
            fits = (array >= -(2**24)) & (array <= 2**24)
    if not fits.all() and not (kind in "iu" and dtype == "float32" and _are_floats(array[~fits])):
        raise refuse(field, f"not every value can be a {dtype} exactly", "INVALID_DTYPE")
    return converted


def _are_floats(integers: NDArray[Any]) -> bool:
    """Whether integers of more than 24 bits happen to be float32 values."""
    return all(int(np.float32(number)) == number for number in integers.ravel().tolist())


def from_any(name: str, value: Any) -> TensorData:
    """Read one of a datum's `loss_fn_inputs`, as what the losses read under that name.

    Args:
        name: Its name; it says the dtype, and a plain list needs one that is known.
        value: TensorData, numpy array, torch tensor or list.

    Raises:
        InvalidArgumentError: The value is no array of numbers, or does not convert exactly.
        UnknownInputError: A plain list under a name that says no dtype.
    """
    field = f'loss_fn_inputs["{name}"]'
    dtype = _DTYPES.get(name)
    if isinstance(value, Mapping) and "data" in value:
        value = TensorData.model_validate(value)
    if isinstance(value, TensorData):
        if dtype is None or value.dtype == dtype:
            return value
        value = value.view()
    elif dtype is None and not is_torch(value) and not isinstance(value, np.ndarray):
        raise UnknownInputError(
            f"{field}: a plain list needs a known name; pass an array or TensorData", field=field
        )
    if name == "target_tokens" and isinstance(value, Mapping):
        array = token_ids(value, field)
    else:
        array = _own(value, dtype, field)
    if not array.ndim:
        raise refuse(field, "expected an array, got one number", "INVALID_SHAPE")
    return _rebuild(array)


def token_ids(value: Any, field: str) -> NDArray[np.int64]:
    """Token ids, int64 `(N,)`, read-only and of their own memory.

    Args:
        value: A list, an array, a tensor or an iterator of integers, or what a tokenizer returns:
            a mapping with `input_ids` (transformers' BatchEncoding) of one text.
        field: Names the argument in an error.

    Raises:
        InvalidArgumentError: It is something else; floats and booleans are no ids.
    """
    encoded = isinstance(value, Mapping)
    if encoded:
        if "input_ids" not in value:
            raise refuse(field, "expected token ids, got a mapping without input_ids")
        value = value["input_ids"]
    if isinstance(value, str | bytes):
        raise refuse(field, "expected token ids, got text; encode it with the tokenizer")
    if not hasattr(value, "__len__") and isinstance(value, Iterable):
        value = list(value)
    array = _copied(value, field)
    if encoded and array.ndim == 2 and len(array) == 1:
        array = array[0]
    if array.size and array.dtype.kind not in "iu":
        raise refuse(field, f"expected integers, got {shown(array.dtype.name)}", "INVALID_DTYPE")
    if array.ndim != 1:
        raise refuse(field, "expected a flat list of integers", "INVALID_SHAPE")
    if not array.size:
        array = np.zeros(0, np.int64)
    array = _exactly(array, "int64", field)
    array.flags.writeable = False
    return array


def target_tokens(value: Any, field: str) -> NDArray[Any]:
    """Token ids for each row, as they are sent: int32 or int64 `(rows, K)`, -1 where there is none.

    Args:
        value: TensorData of int64.
        field: Names the argument in an error.

    Raises:
        InvalidArgumentError: It is something else, or has another number of dimensions.
    """
    if not isinstance(value, TensorData):
        raise refuse(field, f"expected TensorData, got {shown(type(value).__name__)}")
    if value.dtype != "int64":
        raise refuse(field, f"expected int64, got {value.dtype}", "INVALID_DTYPE")
    array = value.to_numpy(pad_value=-1)
    if array.ndim != 2:
        why = f"shape {list(array.shape)}, expected 2 dimensions"
        raise refuse(field, why, "INVALID_SHAPE")
    narrow = array.astype(np.int32)  # half the bytes
    return narrow if (narrow == array).all() else array


def in_layout_of(asked: TensorData | None, array: NDArray[Any]) -> TensorData:
    """A result, as sparse as the argument that asked for it.

    Args:
        asked: That, of the same shape; None where nobody knows it.
        array: The result.
    """
    answer = TensorData(array)
    if asked is not None and asked.shape == answer.shape:
        answer._empty, answer._is_sparse = asked._empty, asked._is_sparse
    return answer
