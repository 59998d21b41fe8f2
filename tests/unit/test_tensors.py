"""The tensor codec: any array comes back, and nothing else is taken for one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tinsmith import tensors
from tinsmith.v1 import types_pb2 as pb

shapes = arrays.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=5)
floats = arrays.arrays(np.float32, shapes)
ints = arrays.arrays(st.sampled_from([np.int32, np.int64]), shapes)


@given(st.one_of(floats, ints), st.booleans())
def test_what_is_encoded_is_decoded(array: np.ndarray, plain: bool) -> None:
    """Shape and values survive, as bytes bit for bit."""
    message = pb.Tensor.FromString(tensors.encode(array, plain=plain).SerializeToString())
    found = tensors.decode(message)
    assert found.shape == array.shape
    if plain:
        np.testing.assert_array_equal(found, array)
    else:
        assert found.dtype == array.dtype
        assert found.tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1, 2], np.int64),
        ([1.5, 2], np.float32),
        (np.ones(2, np.float64), np.float32),
        (np.ones(2, np.uint8), np.int64),
        (np.arange(6).reshape(2, 3).T, np.int64),
        (np.arange(3, dtype=">i8"), np.int64),
    ],
)
def test_wider_and_foreign_arrays_are_converted(values: object, dtype: type) -> None:
    """Lists, float64, other byte orders, and arrays that are not contiguous."""
    found = tensors.decode(tensors.encode(values))  # type: ignore[arg-type]
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, np.asarray(values))


@pytest.mark.parametrize("values", [["a"], [True], [[1], [1, 2]], [None], [1j]])
def test_what_is_no_array_of_numbers_is_refused(values: list[object]) -> None:
    """At once, in the client."""
    with pytest.raises(tensors.TensorError):
        tensors.encode(values)  # type: ignore[arg-type]


@given(st.binary(max_size=40), st.integers(0, 5), st.lists(st.integers(-3, 9), max_size=3))
def test_random_messages_decode_or_are_refused(data: bytes, dtype: int, shape: list[int]) -> None:
    """Nothing but TensorError ever comes out of bytes that someone made up."""
    message = pb.Tensor(data=data, shape=shape)
    message.dtype = dtype  # type: ignore[assignment]
    try:
        array = tensors.decode(message)
    except tensors.TensorError:
        return
    assert array.nbytes == len(data)
