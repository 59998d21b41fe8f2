"""A model's state as the files of a checkpoint, and back. safetensors and JSON, never pickle.

PEFT reads `adapter_model.safetensors` and `adapter_config.json`. Of a model that trains all
weights, transformers reads `model.safetensors`, `config.json` and the tokenizer's files.
`model_state.json` has our settings and the step count, `optimizer.safetensors` the moments.
"""

import dataclasses
import io
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tinsmithd.domain import ModelState, Tuning
from tinsmithd.errors import DataLoss, Reason
from tinsmithd.state import checks as state_checks
from tinsmithd.state import tensors as state_tensors
from tinsmithd.state.checks import FORMAT_VERSION, About, StateInvalid
from tinsmithd.state.tensors import Tensor

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
"""Names of files that a tokenizer may have in a Hugging Face folder; none has all of them."""
LARGE_TEXT_FILES = (TOKENIZER_FILE, "vocab.json", "merges.txt", "vocab.txt")
"""Files of a tokenizer that grow with its vocabulary."""
Content = bytes | bytearray | memoryview
"""Of a file in memory."""
ADAPTER_FILES = (WEIGHTS_FILE, PEFT_CONFIG_FILE, STATE_FILE)
MODEL_FILES = (FULL_WEIGHTS_FILE, FULL_CONFIG_FILE, STATE_FILE)
VOCABULARY_BYTES_MAX = 64 * 1024 * 1024
OTHER_BYTES_MAX = 256 * 1024 * 1024
CONFIG_BYTES_MAX = 4 * 1024 * 1024
_HEADER_ALIGNMENT = 8


def to_pieces(state: ModelState, bytes_max: int) -> Iterator[tuple[str, bytes]]:
    """Write a state as (file name, next bytes), see `to_buffers`.

    Args:
        state: The state, which must not change before the last piece was taken.
        bytes_max: Bytes of a piece; only the last piece of a file has fewer.
    """
    for name, buffers in to_buffers(state):
        for data in _cut(buffers, bytes_max):
            yield name, data


def to_buffers(state: ModelState) -> Iterator[tuple[str, Iterator[memoryview]]]:
    """Write a state as (file name, all its bytes); the optimizer file only where there is state.

    The bytes are those that safetensors writes. But no file is ever held whole, and no call takes
    long: safetensors writes a file in one call, during which no other Python thread runs.

    Args:
        state: The state, which must not change before the last buffer was read.
    """
    for name, content in _plain_files(state).items():
        yield name, iter((memoryview(content),))
    for name, (arrays, metadata) in _tensor_files(state).items():
        yield name, _safetensors(_contiguous(arrays), metadata)


def _plain_files(state: ModelState) -> dict[str, bytes]:
    about = {
        "format_version": FORMAT_VERSION,
        **state.tuning.to_document(),
        "step_count": state.step_count,
        "has_optimizer": bool(state.optimizer),
    }
    _, config_file, _ = required_files(state.tuning)
    return {**state.files, config_file: _json(state.config), STATE_FILE: _json(about)}


def _tensor_files(
    state: ModelState,
) -> dict[str, tuple[Mapping[str, np.ndarray], dict[str, str] | None]]:
    """Arrays and metadata of each safetensors file."""
    weights_file, _, _ = required_files(state.tuning)
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


def state_bytes_max(parameter_count: int) -> int:
    """Maximum bytes of a state: values and two moments of each weight, and other files.

    An adapter has fewer weights than its base, unless the base is as small as in tests.
    """
    return 3 * 4 * parameter_count + OTHER_BYTES_MAX


def required_files(tuning: Tuning) -> tuple[str, str, str]:
    """Names of the files that each state of such a model has: weights, configuration, state."""
    return ADAPTER_FILES if tuning.is_adapter else MODEL_FILES


def optional_files(tuning: Tuning) -> Sequence[str]:
    """Names of files that a state of such a model may have besides, but for the optimizer's."""
    return () if tuning.is_adapter else TOKENIZER_FILES


def bytes_max(name: str) -> int | None:
    """Maximum bytes of a file; None where its tensors determine them."""
    if name.endswith(".safetensors"):
        return None
    if name in LARGE_TEXT_FILES or name.endswith(".model"):
        return VOCABULARY_BYTES_MAX
    is_config = name in TOKENIZER_FILES and name != TEMPLATE_FILE
    return CONFIG_BYTES_MAX if is_config else state_checks.JSON_BYTES_MAX


@dataclasses.dataclass(frozen=True)
class ParsedFiles:
    """The checked content of a state's files.

    Attributes:
        about: The content of `model_state.json`.
        config: The content of `adapter_config.json` or `config.json`.
        weights, moments: Where the tensors are in their files.
    """

    about: About
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]


def parse(
    names: Collection[str],
    open_file: Callable[[str], io.BufferedIOBase],
    tuning: Tuning | None,
    *,
    values: bool = True,
) -> ParsedFiles:
    """Check the files of a state, each by itself and against each other.

    Args:
        names: Names of the files.
        open_file: Opens a file.
        tuning: The tuning that they must have, but for the seed; None allows any.
        values: Whether to check the tensors' values, too.

    Raises:
        StateInvalid: A file is wrong.
    """

    def read(name: str) -> bytes:
        if name not in names:
            raise StateInvalid(name, "", "is missing", Reason.MISSING_FIELD)
        with open_file(name) as file:
            return file.read(state_checks.JSON_BYTES_MAX + 1)

    def tensors(name: str) -> dict[str, Tensor]:
        if name not in names:
            raise StateInvalid(name, "", "is missing", Reason.MISSING_FIELD)
        with open_file(name) as file:
            return state_tensors.parse_tensors(name, file)

    about = state_checks.parse_about(STATE_FILE, read(STATE_FILE), tuning)
    weights_file, config_file, _ = required_files(about.tuning)
    _check_names(names, about)
    config = state_checks.parse_json(config_file, read(config_file))
    if about.tuning.is_adapter:
        state_checks.check_peft_config(config_file, config, about.tuning)
    else:
        state_checks.check_model_config(config_file, config)
    found = {weights_file: tensors(weights_file)}
    state_tensors.check_weights(weights_file, found[weights_file], about.tuning)
    if about.has_optimizer:
        found[OPTIMIZER_FILE] = tensors(OPTIMIZER_FILE)
        state_tensors.check_moments(OPTIMIZER_FILE, found[OPTIMIZER_FILE], found[weights_file])
    for name in optional_files(about.tuning):
        if name in names:
            with open_file(name) as file:
                _check_tokenizer_file(name, file)
    for name, present in found.items() if values else ():
        with open_file(name) as file:
            state_tensors.check_values(name, present, file)
    return ParsedFiles(about, config, found[weights_file], found.get(OPTIMIZER_FILE, {}))


def _check_names(names: Collection[str], about: About) -> None:
    if about.has_optimizer != (OPTIMIZER_FILE in names):
        message = f"it is {about.has_optimizer}, {OPTIMIZER_FILE} says otherwise"
        raise StateInvalid(STATE_FILE, "has_optimizer", message)
    if about.has_optimizer and not about.step_count:
        raise StateInvalid(STATE_FILE, "step_count", "is 0, and there is an optimizer's state")
    allowed = {*required_files(about.tuning), *optional_files(about.tuning), OPTIMIZER_FILE}
    for name in names:
        if name not in allowed:
            text = "such a state has no file of this name"
            raise StateInvalid(name[:100], "", text, Reason.INVALID_NAME)


def _check_tokenizer_file(name: str, file: io.BufferedIOBase) -> None:
    most = bytes_max(name)
    assert most is not None
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if size > most:
        message = f"it has {size} bytes, at most {most} are allowed"
        metadata = {"limit": "bytes", "value": str(size)}
        raise StateInvalid(name, "", message, Reason.LIMIT_EXCEEDED, metadata)
    if name.endswith(".model"):
        return  # SentencePiece's own format, which no server reads
    is_json = name.endswith(".json")
    if name in LARGE_TEXT_FILES or not is_json:
        state_checks.check_text(name, file, is_object=is_json)
    else:
        state_checks.check_no_code(name, state_checks.parse_json(name, file.read(), most))


class _InMemory(io.BufferedIOBase):
    """A file of bytes in memory: `io.BytesIO` would copy a `bytearray`."""

    def __init__(self, content: Content) -> None:
        self._content = memoryview(content)
        self._at = 0

    def read(self, count: int | None = -1, /) -> bytes:
        end = len(self._content) if count is None or count < 0 else self._at + count
        found = bytes(self._content[self._at : end])
        self._at += len(found)
        return found

    def readinto(self, buffer: Any, /) -> int:
        found = self._content[self._at : self._at + len(buffer)]
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = offset + (len(self._content) if whence == io.SEEK_END else 0)
        return self._at

    def close(self) -> None:
        self._content.release()
        super().close()


def from_files(
    files: Mapping[str, Content], tuning: Tuning | None, *, values: bool = True
) -> ModelState:
    """Check a state and read it; nothing is allocated for what a file only claims.

    Args:
        files: Its files.
        tuning: The tuning that they must have, but for the seed; None allows any.
        values: Whether to check the tensors' values, too.

    Raises:
        DataLoss: A file is missing or wrong (CHECKPOINT_CORRUPT).
    """
    try:
        parsed = parse(files.keys(), lambda name: _InMemory(files[name]), tuning, values=values)
        about = parsed.about
        return ModelState(
            tuning=about.tuning,
            weights=_arrays(files[required_files(about.tuning)[0]], parsed.weights),
            optimizer=_arrays(files.get(OPTIMIZER_FILE, b""), parsed.moments),
            step_count=about.step_count,
            config=parsed.config,
            files={name: bytes(files[name]) for name in TOKENIZER_FILES if name in files},
        )
    except StateInvalid as error:
        raise corrupt(str(error)) from error
    except MemoryError:
        raise  # this process is to blame, not the bytes
    except Exception as error:
        # These bytes alone caused it, so no process needs to end.
        raise corrupt(f"they cannot be read ({type(error).__name__})") from error


def corrupt(message: str) -> DataLoss:
    """The error of a state with wrong files."""
    return DataLoss(f"checkpoint files are damaged: {message}", Reason.CHECKPOINT_CORRUPT)


def _arrays(data: Content, tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Tensors as float32 arrays; views of the data where that is float32 already."""
    found = {}
    for name, tensor in tensors.items():
        count = (tensor.end - tensor.start) // tensor.dtype.itemsize
        flat = np.frombuffer(data, tensor.dtype, count, tensor.start)
        found[name] = np.require(flat, np.float32, "A").reshape(tensor.shape)
    return found


def _contiguous(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"
