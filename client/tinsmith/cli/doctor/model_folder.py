"""A check of a base model's folder: what is missing, cut off, or of the wrong kind in it."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinsmith.cli.doctor.findings import OK, WRONG, Finding
from tinsmith.cli.text import size

CHECK = "base model"
JSON_BYTES_MAX = 100_000_000
"""Longest header or index that is read."""
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
_POINTER = b"version https://git-lfs"


class _Bad(Exception):
    """Something is wrong with the folder: a sentence, and a hint."""


def finding(folder: Path) -> Finding:
    """What is so with a folder that holds a base model, as transformers writes it.

    Only `config.json`, names, sizes and the headers of weight files are read.
    """
    try:
        config = _json(folder / "config.json")
        names = list(_weight_files(folder))
        nbytes = sum(_checked(folder / name) for name in names)
        if not any((folder / name).exists() for name in _TOKENIZERS):
            raise _Bad(
                f"{folder} has no tokenizer", f"one of {', '.join(_TOKENIZERS)} belongs there"
            )
    except _Bad as bad:
        text, hint = bad.args
        return Finding(CHECK, WRONG, text, hint)
    except OSError as error:
        return Finding(CHECK, WRONG, f"{error.filename}: {error.strerror}")
    architecture = (config.get("architectures") or [config.get("model_type", "unknown")])[0]
    text = f"{folder.resolve().name}: {architecture}, {size(nbytes)} in {len(names)} file(s)"
    return Finding(CHECK, OK, text)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise _Bad(f"{path} is not there", "this is no folder of a base model, or part of one")
    if path.stat().st_size > JSON_BYTES_MAX:
        raise _Bad(f"{path} is too large to be read", "")
    data = path.read_bytes()
    if data.startswith(_POINTER):
        raise _pointer(path)
    try:
        found = json.loads(data)
    except ValueError as error:
        raise _Bad(f"{path} is no JSON: {error}", "download it again") from error
    if not isinstance(found, dict):
        raise _Bad(f"{path} holds no JSON object", "download it again")
    return found


def _weight_files(folder: Path) -> Iterator[str]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = _json(index).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise _Bad(f"{index} names no files", "download it again")
        yield from sorted({Path(str(name)).name for name in files.values()})
    elif (folder / "model.safetensors").exists():
        yield "model.safetensors"
    elif list(folder.glob("*.bin")):
        hint = "save it with `save_pretrained` of a newer transformers: pickles are not read"
        raise _Bad(f"{folder} has weights as pickles only", hint)
    else:
        raise _Bad(f"{folder} has no model.safetensors", "download the weights, too")


def _checked(path: Path) -> int:
    """Bytes of a file of weights, all of which its header speaks of.

    Raises:
        _Bad: It is cut off, or no safetensors file.
    """
    if not path.exists():
        raise _Bad(f"{path} is not there", "the download was not finished")
    nbytes = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        if _POINTER.startswith(first) and len(first) == 8:
            raise _pointer(path)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else JSON_BYTES_MAX + 1
        if length > JSON_BYTES_MAX:
            raise _Bad(f"{path} is no safetensors file", "download it again")
        try:
            header = json.loads(file.read(length))
            ends = [
                int(entry["data_offsets"][1])
                for name, entry in header.items()
                if name != "__metadata__"
            ]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise _Bad(f"the header of {path} cannot be read", "download it again") from error
    wanted = 8 + length + max(ends, default=0)
    if nbytes != wanted:
        raise _Bad(f"{path} has {nbytes:,} bytes of {wanted:,}", "the download was not finished")
    return nbytes


def _pointer(path: Path) -> _Bad:
    return _Bad(f"{path} is a pointer of git-lfs, not the file", "`git lfs pull` gets the files")
