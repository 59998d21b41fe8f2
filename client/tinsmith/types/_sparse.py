"""Rows of different lengths (CSR), made dense: a Tensor on the wire is dense."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinsmith._check import refuse, whole

CELLS_MAX = 2**28
"""Of a dense array, empty cells too: a few indices could else ask for all memory there is."""


def dense(
    values: NDArray[Any], crow_indices: Any, col_indices: Any, shape: Any
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """A dense array of a sparse one, with 0 in its empty cells.

    Args:
        values: The n values, row by row.
        crow_indices: For each row where its values begin, and n at the end.
        col_indices: The column of each value; no column twice in a row.
        shape: Rows and columns.

    Returns:
        The array, and where it is empty.

    Raises:
        InvalidArgumentError: They contradict each other, or the array is too large.
    """
    if not isinstance(shape, list | tuple) or len(shape) != 2:
        raise refuse("shape", "a sparse array needs rows and columns", "INVALID_SHAPE")
    rows, columns = (whole(side, "shape", 0) for side in shape)
    if rows * columns > CELLS_MAX:
        why = f"{rows} x {columns} cells are more than {CELLS_MAX}"
        raise refuse("shape", why, "INVALID_SHAPE")
    starts = _indices(crow_indices, "sparse_crow_indices", len(values))
    if len(starts) != rows + 1 or starts[0] != 0 or starts[-1] != len(values):
        why = f"expected {rows + 1} numbers from 0 to {len(values)}"
        raise refuse("sparse_crow_indices", why, "INVALID_SHAPE")
    if (np.diff(starts) < 0).any():
        raise refuse("sparse_crow_indices", "go down", "INVALID_SHAPE")
    columns_of = _indices(col_indices, "sparse_col_indices", columns - 1)
    if values.ndim != 1 or len(columns_of) != len(values):
        why = f"expected one number for each of {values.size} values in a row"
        raise refuse("sparse_col_indices", why, "INVALID_SHAPE")
    rows_of = np.repeat(np.arange(rows), np.diff(starts))
    array = np.zeros((rows, columns), values.dtype)
    array[rows_of, columns_of] = values
    empty = np.ones((rows, columns), bool)
    empty[rows_of, columns_of] = False
    if int(empty.sum()) != empty.size - len(values):
        raise refuse("sparse_col_indices", "a row has a column twice", "INVALID_SHAPE")
    return array, empty


def compressed(empty: NDArray[np.bool_]) -> tuple[list[int], list[int]]:
    """For each row where its values begin, and their number at the end; the column of each."""
    rows, columns = np.nonzero(~empty)
    starts = np.searchsorted(rows, np.arange(len(empty) + 1))
    return starts.tolist(), columns.tolist()


def _indices(given: Any, field: str, most: int) -> NDArray[np.int64]:
    """int64 `(n,)`, each from 0 to `most`."""
    try:
        array = np.asarray(given)
    except ValueError:
        raise refuse(field, "rows have different lengths", "INVALID_SHAPE") from None
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise refuse(field, "expected a flat list of integers", "INVALID_SHAPE")
    if array.size and not (array.min() >= 0 and array.max() <= most):
        raise refuse(field, f"not every number is in 0..{most}", "INVALID_SHAPE")
    return array.astype(np.int64)
