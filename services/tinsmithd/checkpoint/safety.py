"""What may be stored: safetensors and JSON of known names. Nothing that runs when it is read."""

import json
import struct
from collections.abc import Collection, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from tinsmithd import state_files
from tinsmithd.checkpoint.store import Blob, Staging
from tinsmithd.domain import CheckpointKind, FullConfig, Tuning
from tinsmithd.errors import InvalidArgument, Reason

LORA_FILES = (
    state_files.WEIGHTS_FILE,
    state_files.PEFT_CONFIG_FILE,
    state_files.STATE_FILE,
)
FULL_FILES = (
    state_files.FULL_WEIGHTS_FILE,
    state_files.FULL_CONFIG_FILE,
    state_files.STATE_FILE,
)
TEXT_BYTES_MAX = 1024 * 1024
TOKENIZER_BYTES_MAX = 64 * 1024 * 1024
LARGE_FILES = frozenset(state_files.TOKENIZER_FILES) - {state_files.TEMPLATE_FILE}
HEADER_BYTES_MAX = 64 * 1024 * 1024


def _required(tuning: Tuning) -> Sequence[str]:
    return FULL_FILES if isinstance(tuning, FullConfig) else LORA_FILES


def check_file_name(name: str, kind: CheckpointKind, tuning: Tuning) -> None:
    """Refuse a file that a checkpoint of this kind does not have.

    Raises:
        InvalidArgument: See above (INVALID_NAME).
    """
    allowed = list(_required(tuning))
    if isinstance(tuning, FullConfig):
        allowed += state_files.TOKENIZER_FILES
    if kind is CheckpointKind.TRAINING:
        # Absent where no step was made yet.
        allowed.append(state_files.OPTIMIZER_FILE)
    if name not in allowed:
        message = f"a {kind} checkpoint has {', '.join(allowed)}, not {name[:100]!r}"
        raise InvalidArgument("piece.file_name", message, Reason.INVALID_NAME)


def check_files(staging: Staging, blobs: Collection[Blob], tuning: Tuning) -> None:
    """Refuse files that are not what their names say.

    Raises:
        InvalidArgument: One is missing, no safetensors file, no JSON object, or no text.
    """
    present = {blob.name for blob in blobs}
    for name in _required(tuning):
        if name not in present:
            raise InvalidArgument("commit.files", f"{name} is missing", Reason.MISSING_FIELD)
    for blob in blobs:
        if blob.name.endswith(".safetensors"):
            _check_safetensors(blob.name, staging.path(blob.name))
        else:
            _check_text(blob, staging.path(blob.name))


def _check_safetensors(name: str, path: Path) -> None:
    try:
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
        if header_bytes > HEADER_BYTES_MAX:
            raise ValueError(f"its header has {header_bytes} bytes")
        # Reads and checks the header: offsets, dtypes, and that they fill the file.
        with safe_open(path, framework="numpy") as tensors:
            if not tensors.keys():
                raise ValueError("it holds no tensor")
    except (SafetensorError, struct.error, ValueError) as error:
        message = f"{name} is not a safetensors file: {error}"
        raise InvalidArgument("commit.files", message) from error


def _check_text(blob: Blob, path: Path) -> None:
    bytes_max = TOKENIZER_BYTES_MAX if blob.name in LARGE_FILES else TEXT_BYTES_MAX
    if blob.size_bytes > bytes_max:
        message = f"{blob.name} has more than {bytes_max} bytes"
        raise InvalidArgument("commit.files", message, Reason.LIMIT_EXCEEDED)
    if blob.name.endswith(".model"):
        return  # SentencePiece's own bytes, which no server reads
    try:
        text = path.read_bytes().decode()
    except ValueError as error:
        message = f"{blob.name} is not UTF-8: {error}"
        raise InvalidArgument("commit.files", message) from error
    if not blob.name.endswith(".json"):
        return
    try:
        if not isinstance(json.loads(text), dict):
            raise ValueError("no object")
    except (ValueError, RecursionError) as error:
        message = f"{blob.name} is not a JSON object: {error}"
        raise InvalidArgument("commit.files", message) from error
