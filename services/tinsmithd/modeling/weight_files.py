"""Checks the weight files of a base model's folder before anything is allocated for them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinsmithd.errors import NotFound, Reason

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
POINTER_START = b"version https://git-lfs.github.com/spec/"
"""First bytes of a Git LFS pointer, which stands for a file that was not fetched."""

NAMES_SHOWN_MAX = 8
"""Maximum names of weights in one message."""

_HEADER_LENGTH_BYTES = 8
_HEADER_BYTES_MAX = 100_000_000  # safetensors takes no longer one
_READ_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's elements are, one after the other in row-major order.

    Attributes:
        path: A safetensors file.
        offset: Of the first byte in it.
        dtype: As the file says it: "BF16".
        shape: Its shape.
    """

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]


def check_fetched(folder: Path) -> None:
    """Refuse a folder with files that are Git LFS pointers.

    Raises:
        NotFound: See above (BASE_MODEL_NOT_FOUND). The message names them.
    """
    pointers = [path.name for path in sorted(folder.iterdir()) if _is_pointer(path)]
    if pointers:
        raise refused(
            folder,
            f"{shown(pointers)} only point to files in Git LFS; fetch them with `git lfs pull`",
        )


def check_weights(folder: Path) -> None:
    """Refuse a folder whose files cannot hold the weights.

    Args:
        folder: A folder in Hugging Face's format.

    Raises:
        NotFound: A file is missing or cut, or an index and the files do not fit together
            (BASE_MODEL_NOT_FOUND). The message names it.
    """
    if (folder / WEIGHTS_FILE).is_file():  # transformers prefers it to an index, too
        _names(folder, WEIGHTS_FILE)
    elif (folder / INDEX_FILE).is_file():
        _check_index(folder)
    else:
        raise refused(
            folder, f"there is neither {WEIGHTS_FILE} nor {INDEX_FILE}: only safetensors are read"
        )


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors in the weight files of a folder, by name.

    Raises:
        NotFound: As `check_weights` (BASE_MODEL_NOT_FOUND).
    """
    check_weights(folder)
    file_names = {WEIGHTS_FILE}
    if not (folder / WEIGHTS_FILE).is_file():
        file_names = set(json.loads((folder / INDEX_FILE).read_bytes())["weight_map"].values())
    found = {}
    for file_name in sorted(file_names):
        header, begin = _header(folder, file_name)
        for name, entry in header.items():
            offset, shape = begin + entry["data_offsets"][0], tuple(entry["shape"])
            found[name] = StoredTensor(folder / file_name, offset, entry["dtype"], shape)
    return found


def check_loaded(name: object, found: Mapping[str, Any]) -> None:
    """Refuse a model whose checkpoint does not have exactly its weights.

    Args:
        name: Name of the model, for the message.
        found: The report of transformers: `missing_keys`, `unexpected_keys`, and `mismatched_keys`
            with both shapes. Tied weights, and weights that the architecture allows to be missing
            or superfluous, are not among them.

    Raises:
        NotFound: See above (BASE_MODEL_NOT_FOUND). The message has names and shapes.
    """
    wrong = [
        f"{weight} of shape {list(theirs)} instead of {list(ours)}"
        for weight, theirs, ours in sorted(found["mismatched_keys"])
    ]
    parts = [
        f"it {verb} {shown(sorted(names))}"
        for verb, names in (
            ("lacks", found["missing_keys"]),
            ("has, beyond the model,", found["unexpected_keys"]),
            ("has", wrong),
        )
        if names
    ]
    if parts:
        raise refused(name, "its checkpoint does not fit config.json: " + "; ".join(parts))


def refused(name: object, message: str) -> NotFound:
    """The error of a base model that cannot be served."""
    return NotFound(f"cannot load base model {name}: {message}", Reason.BASE_MODEL_NOT_FOUND)


def shown(names: Sequence[str]) -> str:
    """The first few names and the number of the others."""
    more = len(names) - NAMES_SHOWN_MAX
    return ", ".join(names[:NAMES_SHOWN_MAX]) + (f" and {more} more" if more > 0 else "")


def _is_pointer(path: Path) -> bool:
    if path.suffix not in _READ_SUFFIXES or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(POINTER_START)) == POINTER_START


def _check_index(folder: Path) -> None:
    try:
        index = json.loads((folder / INDEX_FILE).read_bytes())
        places, _ = index["weight_map"], index["metadata"]  # transformers reads both
        wanted: dict[str, list[str]] = {}
        for weight, file_name in places.items():
            wanted.setdefault(file_name, []).append(weight)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise refused(folder, f"{INDEX_FILE} is no index of weights") from error
    inside = {name: isinstance(name, str) and Path(name).name == name for name in wanted}
    if foreign := [str(name) for name, is_inside in inside.items() if not is_inside]:
        raise refused(folder, f"{INDEX_FILE} names {shown(foreign)}, outside of the folder")
    absent = sorted(name for name in wanted if not (folder / name).is_file())
    if absent:
        raise refused(folder, f"{INDEX_FILE} names {shown(absent)}, which are not there")
    for file_name, weights in sorted(wanted.items()):
        lacking = sorted(set(weights) - _names(folder, file_name))
        if lacking:
            message = f"{file_name} lacks {shown(lacking)}, which {INDEX_FILE} says are there"
            raise refused(folder, message)


def _names(folder: Path, file_name: str) -> set[str]:
    """Names of the tensors in a safetensors file."""
    return set(_header(folder, file_name)[0])


def _header(folder: Path, file_name: str) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors, which has their length, and where they begin."""
    path = folder / file_name
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_HEADER_LENGTH_BYTES), "little")
            if length > min(_HEADER_BYTES_MAX, size - _HEADER_LENGTH_BYTES):
                raise ValueError
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        content = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        message = f"{file_name} ({size:,} bytes) is cut or no safetensors file"
        raise refused(folder, message) from error
    begin = _HEADER_LENGTH_BYTES + length
    whole = begin + content
    if size != whole:
        what = "cut" if size < whole else "longer than its header says"
        raise refused(folder, f"{file_name} is {what}: {size:,} bytes, not {whole:,}")
    return header, begin
