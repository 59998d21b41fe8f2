"""Where the elements of a model's parameters are in its files.

A parameter often is one tensor of the files. But transformers makes one parameter of the tensors of
all experts, for example. What a parameter consists of is found out with transformers' own
conversions: they are given the numbers of the files' rows instead of the rows.
"""

from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from tinsmithd.modeling.weight_files import StoredTensor, refused, stored_tensors

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Dtypes of weights, by their names in safetensors files."""


@dataclass(frozen=True)
class Piece:
    """Elements of a parameter that stand side by side in a file, too.

    Attributes:
        start: Number of the first one in the parameter, flat.
        stop: One after the number of the last.
        path: The file.
        offset: Of the first one's first byte there.
        dtype: In the file.
    """

    start: int
    stop: int
    path: Path
    offset: int
    dtype: torch.dtype

    def offset_of(self, number: int) -> int:
        """Offset of an element, by its number in the parameter."""
        return self.offset + (number - self.start) * self.dtype.itemsize


def pieces_of(model: Any, folder: Path) -> Mapping[str, Sequence[Piece]]:
    """What each parameter of a model consists of, in order, by its name.

    Args:
        model: The model; names and shapes were checked against the files (`check_loaded`).
        folder: The folder with its files.

    Raises:
        NotFound: A parameter does not consist of rows of the files (BASE_MODEL_NOT_FOUND).
    """
    rows = _Rows(stored_tensors(folder))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = {}
    for name, numbers in _converted(model, rows.numbers, shapes):
        pieces = rows.pieces(numbers) if numbers.shape == (*shapes[name][:-1], 1) else []
        if not pieces or pieces[-1].stop != prod(shapes[name]):
            raise refused(folder, f"{name} is stored in a way that cannot be read in slices")
        found[name] = pieces
    # Of weights that are shared, the files may have any name.
    stored = {
        id(parameter): found[name]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name in found
    }
    return {name: stored[id(parameter)] for name, parameter in model.named_parameters()}


class _Rows:
    """Numbers for the rows of all tensors.

    Attributes:
        numbers: By tensor, makes the numbers of its rows, `(..., 1)`.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = list(tensors.values())
        self._first: list[int] = []
        self.numbers: dict[str, Callable[[], torch.Tensor]] = {}
        first = 0
        for name, tensor in tensors.items():
            count = prod(tensor.shape[:-1])
            self._first.append(first)
            self.numbers[name] = partial(_numbers, first, (*tensor.shape[:-1], 1))
            first += count + 1  # with a gap, so that no run goes on in another tensor

    def pieces(self, numbers: torch.Tensor) -> list[Piece]:
        """The pieces that rows are, in their order; none if they have no dtype of `DTYPES`."""
        flat = numbers.reshape(-1).numpy()
        ends = [*(np.flatnonzero(np.diff(flat) != 1) + 1).tolist(), len(flat)]
        found, at, start = [], 0, 0
        for end in ends:
            row = int(flat[at])
            index = bisect(self._first, row) - 1
            tensor = self._tensors[index]
            dtype, width = DTYPES.get(tensor.dtype), tensor.shape[-1]
            if dtype is None:
                return []
            offset = tensor.offset + (row - self._first[index]) * width * dtype.itemsize
            stop = start + (end - at) * width
            found.append(Piece(start, stop, tensor.path, offset, dtype))
            at, start = end, stop
        return found


def _numbers(first: int, shape: Sequence[int]) -> torch.Tensor:
    return torch.arange(first, first + prod(shape)).reshape(*shape)


def _converted(
    model: Any,
    numbers: Mapping[str, Callable[[], torch.Tensor]],
    shapes: Mapping[str, Sequence[int]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name parameters and convert tensors as transformers does when it loads them."""
    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    plan: dict[str, Any] = {}
    for name in sorted(numbers, key=dot_natural_key):
        # A name may be the model's already.
        ways: list[tuple[list[Any], list[Any]]] = [(renamings, converters), ([], [])]
        for way in ways if name in shapes else ways[:1]:
            renamed, pattern = rename_source_key(name, *way, model.base_model_prefix, shapes)
            if renamed in shapes:
                break
        else:
            continue  # `check_loaded` knows what may be there beyond the model
        if renamed not in plan:
            plan[renamed] = (
                WeightRenaming(name, renamed) if pattern is None else deepcopy(by_pattern[pattern])
            )
        plan[renamed].add_tensor(renamed, name, pattern or name, numbers[name])
    for name, transform in plan.items():
        for parameter, found in transform.convert(name, model=model, config=model.config).items():
            yield parameter, found[0] if isinstance(found, list) else found
