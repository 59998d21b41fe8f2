"""Checks the tensors of a state's safetensors files: headers, shapes and values.

Only headers are held in memory; values are read piece by piece.
"""

import io
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinsmithd.domain import MOMENTS, Tuning
from tinsmithd.errors import Reason
from tinsmithd.state.checks import (
    PIECE_BYTES,
    StateInvalid,
    is_name,
    over,
    parse_json,
    short,
)

HEADER_BYTES_MAX = 2 * 1024 * 1024
TENSORS_MAX = 16_384
DIMENSIONS_MAX = 4
DIMENSION_MAX = 1 << 40
OFFSET_MAX = 1 << 62

_DTYPES: Mapping[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}
_ABOUT = {"dtype", "shape", "data_offsets"}
_LORA_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*\.lora_[AB]\.weight")
_EXPERTS = "experts."
"""Part of the names of LoRA tensors that have a slice for each expert."""


@dataclass(frozen=True)
class Tensor:
    """Where a tensor is in its file.

    Attributes:
        dtype: Dtype of its elements.
        shape: Its dimensions.
        start, end: Range of its bytes, from the beginning of the file.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    end: int


def parse_tensors(file: str, content: io.BufferedIOBase) -> dict[str, Tensor]:
    """Read the header of a safetensors file, whose tensors follow each other and fill the file.

    Args:
        file: Its name.
        content: Its content, seekable.

    Raises:
        StateInvalid: The file is no such file, or no state has such a tensor.
    """
    size = content.seek(0, io.SEEK_END)
    content.seek(0)
    length = int.from_bytes(content.read(8), "little")
    if size < 8 or length > size - 8:
        raise StateInvalid(file, "", "not a safetensors file: it is cut off in its header")
    if length > HEADER_BYTES_MAX:
        raise over(file, "", "header bytes", length, HEADER_BYTES_MAX)
    header = parse_json(file, content.read(length), HEADER_BYTES_MAX)
    _check_metadata(file, header.pop("__metadata__", None))
    if not header:
        raise StateInvalid(file, "", "it holds no tensor")
    if len(header) > TENSORS_MAX:
        raise over(file, "", "tensors", len(header), TENSORS_MAX)
    begin = 8 + length
    found = {name: _tensor(file, name, about, begin) for name, about in header.items()}
    end = begin
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != end:
            message = "its bytes do not follow those of the tensor before it"
            raise StateInvalid(file, _of(name), message)
        end = tensor.end
    if end != size:
        raise StateInvalid(file, "", f"it has {size} bytes, its tensors end at {short(end)}")
    return found


def _of(name: str) -> str:
    return f"[{json.dumps(name[:100])}]"


def _check_metadata(file: str, found: object) -> None:
    texts = isinstance(found, dict) and all(isinstance(text, str) for text in found.values())
    if found is not None and not texts:
        raise StateInvalid(file, "__metadata__", "not texts by name")


def _tensor(file: str, name: str, about: object, begin: int) -> Tensor:
    if not is_name(name):
        raise StateInvalid(file, _of(name), "no name of a tensor", Reason.INVALID_NAME)
    if not isinstance(about, dict) or about.keys() != _ABOUT:
        raise StateInvalid(file, _of(name), "not dtype, shape and data_offsets")
    dtype, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        message = f"{short(dtype)} is not one of {', '.join(_DTYPES)}"
        raise StateInvalid(file, _of(name), message, Reason.INVALID_DTYPE)
    if not isinstance(shape, list) or not 1 <= len(shape) <= DIMENSIONS_MAX:
        message = f"a shape has 1 to {DIMENSIONS_MAX} dimensions"
        raise StateInvalid(file, _of(name), message, Reason.INVALID_SHAPE)
    for size in shape:
        if type(size) is not int or not 1 <= size <= DIMENSION_MAX:
            message = f"{short(size)} is no dimension in 1..{DIMENSION_MAX}"
            raise StateInvalid(file, _of(name), message, Reason.INVALID_SHAPE)
    if not isinstance(offsets, list) or len(offsets) != 2:
        raise StateInvalid(file, _of(name), "data_offsets are not two")
    start, end = offsets
    if not (type(start) is type(end) is int and 0 <= start <= end <= OFFSET_MAX):
        message = f"data_offsets {short(offsets)} are no range in 0..{OFFSET_MAX}"
        raise StateInvalid(file, _of(name), message)
    nbytes = math.prod(shape) * _DTYPES[dtype].itemsize
    if end - start != nbytes:
        message = f"shape {shape} has {short(nbytes)} bytes, data_offsets are {end - start} apart"
        raise StateInvalid(file, _of(name), message, Reason.INVALID_SHAPE)
    return Tensor(_DTYPES[dtype], tuple(shape), begin + start, begin + end)


def check_weights(file: str, tensors: Mapping[str, Tensor], tuning: Tuning) -> None:
    """Check names and shapes of the weights against the tuning.

    Each module of an adapter has A `(r, in)` and B `(out, r)`; all experts together have a multiple
    of their rank.

    Raises:
        StateInvalid: No model of this tuning has such weights.
    """
    if not tuning.is_adapter:
        return
    for name, tensor in tensors.items():
        if not _LORA_NAME.fullmatch(name):
            message = "not the name of a LoRA weight"
            raise StateInvalid(file, _of(name), message, Reason.INVALID_NAME)
        is_a = ".lora_A." in name
        other = name.replace(".lora_A.", ".lora_B.") if is_a else name.replace("_B.", "_A.")
        if other not in tensors:
            raise StateInvalid(file, _of(other), "is missing", Reason.MISSING_FIELD)
        inner = tensor.shape[0 if is_a else -1]
        of_experts = _EXPERTS in name
        rank = tuning.expert_adapter_rank if of_experts else tuning.adapter_rank
        fits = inner % rank == 0 if of_experts else inner == rank
        if len(tensor.shape) != 2 or not fits:
            message = f"shape {list(tensor.shape)} is not one of rank {rank}"
            raise StateInvalid(file, _of(name), message, Reason.INVALID_SHAPE)
        theirs = tensors[other].shape
        if inner != theirs[-1 if is_a else 0]:
            message = f"shapes {list(tensor.shape)} and {list(theirs)} do not fit each other"
            raise StateInvalid(file, _of(name), message, Reason.INVALID_SHAPE)


def check_moments(file: str, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Check that each weight has two moments of its shape, float32, and that there are no others.

    Raises:
        StateInvalid: A moment is missing, superfluous, or of another shape or dtype.
    """
    wanted = {f"{kind}.{name}": w.shape for kind in MOMENTS for name, w in weights.items()}
    for name in wanted.keys() - tensors.keys():
        raise StateInvalid(file, _of(name), "is missing", Reason.MISSING_FIELD)
    for name, tensor in tensors.items():
        if name not in wanted:
            raise StateInvalid(file, _of(name), "is no moment of a weight", Reason.INVALID_NAME)
        if tensor.shape != wanted[name]:
            message = f"shape {list(tensor.shape)}, its weight has {list(wanted[name])}"
            raise StateInvalid(file, _of(name), message, Reason.INVALID_SHAPE)
        if tensor.dtype != _DTYPES["F32"]:
            raise StateInvalid(file, _of(name), "moments are F32", Reason.INVALID_DTYPE)


def check_values(file: str, tensors: Mapping[str, Tensor], content: io.BufferedIOBase) -> None:
    """Refuse values that training cannot go on from: values not finite, second moments below 0.

    Raises:
        StateInvalid: There is such a value.
    """
    for run in _runs(tensors):
        # At once, since a file may have thousands of small tensors.
        if _problem(file, run[0][1], run[-1][1], run[0][0], content) is None:
            continue
        for name, tensor in run:
            problem = _problem(file, tensor, tensor, name, content)
            if problem is not None:
                raise StateInvalid(file, _of(name), *problem)


def _runs(tensors: Mapping[str, Tensor]) -> Iterator[list[tuple[str, Tensor]]]:
    """Tensors of which the same is asked, in the order in which they follow each other."""
    ordered = sorted(tensors.items(), key=lambda item: item[1].start)
    for _, run in itertools.groupby(ordered, lambda item: (item[1].dtype, _is_square(item[0]))):
        yield list(run)


def _is_square(name: str) -> bool:
    """Whether a tensor is a second moment."""
    return name.startswith(f"{MOMENTS[1]}.")


def _problem(
    file: str, first: Tensor, last: Tensor, name: str, content: io.BufferedIOBase
) -> tuple[str, Reason] | None:
    """What is wrong with the values from one tensor to another that is alike, if anything."""
    content.seek(first.start)
    left = last.end - first.start
    # Always the same memory, as in `files.file_digest`.
    piece = memoryview(bytearray(min(left, PIECE_BYTES)))
    values = np.frombuffer(piece, first.dtype)
    finite = np.empty(len(values), bool)
    while left:
        nbytes = content.readinto(piece[:left])
        if nbytes != min(left, len(piece)):
            raise StateInvalid(file, "", "it is cut off")
        left -= nbytes
        count = nbytes // first.dtype.itemsize
        if not np.isfinite(values[:count], out=finite[:count]).all():
            return "a value is not finite", Reason.NON_FINITE
        if _is_square(name) and values[:count].min() < 0:
            return "a second moment is below 0", Reason.INVALID_FIELD
    return None
