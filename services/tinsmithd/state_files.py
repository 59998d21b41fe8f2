"""A model's state as the files of a checkpoint, and back. safetensors and JSON, never pickle.

`adapter_model.safetensors` and `adapter_config.json` are what PEFT writes and reads; of a model
that trains all weights, `model.safetensors`, `config.json` and the tokenizer's files are what
transformers does. `model_state.json` has our settings and the step count;
`optimizer.safetensors` the moments.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from tinsmithd.domain import FullConfig, LoraConfig, ModelState
from tinsmithd.errors import DataLoss, Reason

WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_CONFIG_FILE = "adapter_config.json"
STATE_FILE = "model_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
FULL_WEIGHTS_FILE = "model.safetensors"
FULL_CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    TEMPLATE_FILE,
    "chat_template.json",
)
"""Names of the files that a tokenizer may have in a Hugging Face folder; none has them all."""
FORMAT_VERSION = 1
_HEADER_ALIGNMENT = 8


def to_files(state: ModelState) -> dict[str, bytes]:
    """Write a state as file name to content; the optimizer file only where there is state."""
    files = _plain_files(state)
    for name, (arrays, metadata) in _tensor_files(state).items():
        files[name] = save(_contiguous(arrays), metadata=metadata)
    return files


def to_pieces(state: ModelState, bytes_max: int) -> Iterator[tuple[str, bytes]]:
    """What `to_files` writes, byte for byte, as (file name, next bytes).

    No file is ever held whole, and no call takes long: safetensors writes a file in one call,
    during which no other thread of Python's runs.

    Args:
        state: What to write; it must not change before the last piece was taken.
        bytes_max: Bytes of a piece; only the last one of a file has fewer.
    """
    for name, content in _plain_files(state).items():
        for data in _cut([memoryview(content)], bytes_max):
            yield name, data
    for name, (arrays, metadata) in _tensor_files(state).items():
        for data in _cut(_safetensors(_contiguous(arrays), metadata), bytes_max):
            yield name, data


def _plain_files(state: ModelState) -> dict[str, bytes]:
    full = isinstance(state.tuning, FullConfig)
    about = {
        "format_version": FORMAT_VERSION,
        "full" if full else "lora": dataclasses.asdict(state.tuning),
        "step_count": state.step_count,
        "has_optimizer": bool(state.optimizer),
    }
    return {
        **state.files,
        FULL_CONFIG_FILE if full else PEFT_CONFIG_FILE: _json(state.config),
        STATE_FILE: _json(about),
    }


def _tensor_files(
    state: ModelState,
) -> dict[str, tuple[Mapping[str, np.ndarray], dict[str, str] | None]]:
    """Arrays and metadata of each safetensors file."""
    weights_file = FULL_WEIGHTS_FILE if isinstance(state.tuning, FullConfig) else WEIGHTS_FILE
    files: dict[str, tuple[Mapping[str, np.ndarray], dict[str, str] | None]] = {
        weights_file: (state.weights, {"format": "pt"})
    }
    if state.optimizer:
        files[OPTIMIZER_FILE] = (state.optimizer, None)
    return files


def _safetensors(
    arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None
) -> Iterator[memoryview]:
    """A file of float32 tensors: length of the header, header, then the tensors in its order."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    start = 0
    for name, array in arrays.items():
        end = start + array.nbytes
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for array in arrays.values():
        yield array.astype("<f4", copy=False).reshape(-1).view(np.uint8).data


def _cut(buffers: Iterable[memoryview], bytes_max: int) -> Iterator[bytes]:
    waiting: list[memoryview] = []
    room = bytes_max
    for buffer in buffers:
        while len(buffer) >= room:
            yield b"".join([*waiting, buffer[:room]])
            buffer, waiting, room = buffer[room:], [], bytes_max
        waiting.append(buffer)
        room -= len(buffer)
    if room < bytes_max:
        yield b"".join(waiting)


def from_files(files: Mapping[str, bytes]) -> ModelState:
    """Read a state.

    Raises:
        DataLoss: A file is missing or not what it should be (CHECKPOINT_CORRUPT).
    """
    try:
        about = json.loads(files[STATE_FILE])
        if about["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version {about['format_version']} is not known here")
        full = "full" in about
        return ModelState(
            tuning=FullConfig(**about["full"]) if full else LoraConfig(**about["lora"]),
            weights=load(files[FULL_WEIGHTS_FILE if full else WEIGHTS_FILE]),
            optimizer=load(files[OPTIMIZER_FILE]) if OPTIMIZER_FILE in files else {},
            step_count=int(about["step_count"]),
            config=json.loads(files[FULL_CONFIG_FILE if full else PEFT_CONFIG_FILE]),
            files={name: files[name] for name in TOKENIZER_FILES if name in files},
        )
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise DataLoss(
            f"checkpoint files are damaged: {error}", Reason.CHECKPOINT_CORRUPT
        ) from error


def _contiguous(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"
