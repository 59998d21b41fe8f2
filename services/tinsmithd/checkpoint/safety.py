"""What may be stored: safetensors and JSON of known names. Nothing that runs when it is read."""

import json
import struct
from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError, safe_open

from tinsmithd import state_files
from tinsmithd.checkpoint.store import Blob, Staging
from tinsmithd.domain import CheckpointKind
from tinsmithd.errors import InvalidArgument, Reason

REQUIRED_FILES = (
    state_files.WEIGHTS_FILE,
    state_files.PEFT_CONFIG_FILE,
    state_files.STATE_FILE,
)
JSON_BYTES_MAX = 1024 * 1024
HEADER_BYTES_MAX = 64 * 1024 * 1024


def check_file_name(name: str, kind: CheckpointKind) -> None:
    """Refuse a file that a checkpoint of this kind does not have.

    Raises:
        InvalidArgument: See above (INVALID_NAME).
    """
    allowed = list(REQUIRED_FILES)
    if kind is CheckpointKind.TRAINING:
        # Absent where no step was made yet.
        allowed.append(state_files.OPTIMIZER_FILE)
    if name not in allowed:
        message = f"a {kind} checkpoint has {', '.join(allowed)}, not {name[:100]!r}"
        raise InvalidArgument("piece.file_name", message, Reason.INVALID_NAME)


def check_files(staging: Staging, blobs: Collection[Blob]) -> None:
    """Refuse files that are not what their names say.

    Raises:
        InvalidArgument: One is missing, no safetensors file, or no JSON object.
    """
    present = {blob.name for blob in blobs}
    for name in REQUIRED_FILES:
        if name not in present:
            raise InvalidArgument("commit.files", f"{name} is missing", Reason.MISSING_FIELD)
    for blob in blobs:
        if blob.name.endswith(".safetensors"):
            _check_safetensors(blob.name, staging.path(blob.name))
        else:
            _check_json(blob, staging.path(blob.name))


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


def _check_json(blob: Blob, path: Path) -> None:
    if blob.size_bytes > JSON_BYTES_MAX:
        message = f"{blob.name} has more than {JSON_BYTES_MAX} bytes"
        raise InvalidArgument("commit.files", message, Reason.LIMIT_EXCEEDED)
    try:
        if not isinstance(json.loads(path.read_bytes()), dict):
            raise ValueError("no object")
    except (ValueError, RecursionError) as error:
        message = f"{blob.name} is not a JSON object: {error}"
        raise InvalidArgument("commit.files", message) from error
