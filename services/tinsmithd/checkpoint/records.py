"""The values of the Checkpoint server: what it is told to write and what it knows afterwards.

Plain dataclasses, without the wire and without the disk. Times are nanoseconds since the epoch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from tinsmithd.domain import CheckpointKind, CheckpointPath, LoraConfig

NANOSECONDS = 1_000_000_000


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint; `sha256` is the digest of its content, 32 bytes."""

    name: str
    size_bytes: int
    sha256: bytes


@dataclass(frozen=True)
class CheckpointRecord:
    """What is known of a committed checkpoint. `expire_ns` None means that it stays."""

    path: CheckpointPath
    base_model: str
    lora: LoraConfig
    step_count: int
    create_ns: int
    expire_ns: int | None
    user_metadata: Mapping[str, str]
    public: bool
    files: tuple[FileRecord, ...]
    """Sorted by name."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all its files."""
        return sum(file.size_bytes for file in self.files)

    @property
    def digests(self) -> list[bytes]:
        """SHA-256 of each file."""
        return [file.sha256 for file in self.files]

    def same_content(self, other: "CheckpointRecord") -> bool:
        """True when both hold the same files for the same base model."""
        return (self.files, self.base_model) == (other.files, other.base_model)


@dataclass(frozen=True)
class CheckpointPage:
    """A page of a listing; `next_token` is empty on the last one."""

    checkpoints: tuple[CheckpointRecord, ...]
    next_token: str
    total_count: int


@dataclass(frozen=True)
class CheckpointQuery:
    """Which checkpoints to list; None means all."""

    model_id: str | None = None
    kind: CheckpointKind | None = None


@dataclass(frozen=True)
class CheckpointChange:
    """What to change of a checkpoint; None leaves a value as it is."""

    sets_ttl: bool = False
    ttl_seconds: int | None = None
    """With `sets_ttl`: seconds from now, None for ever."""
    user_metadata: Mapping[str, str] | None = None
    public: bool | None = None


@dataclass(frozen=True)
class WriteHeader:
    """The first message of a write. `lora` None means: as `model_state.json` says."""

    path: CheckpointPath
    base_model: str
    lora: LoraConfig | None
    sets_seed: bool
    """Whether `lora.seed` was said; otherwise it is not compared with the files."""
    step_count: int
    ttl_seconds: int | None
    overwrite: bool
    user_metadata: Mapping[str, str]


@dataclass(frozen=True)
class WritePiece:
    """The next bytes of a file with the CRC-32 that they must have."""

    file_name: str
    offset: int
    data: bytes
    crc32: int


@dataclass(frozen=True)
class WriteCommit:
    """The last message of a write: the files as they must have arrived."""

    files: tuple[FileRecord, ...]


WriteMessage = WriteHeader | WritePiece | WriteCommit


def expire_at(now_ns: int, ttl_seconds: int | None) -> int | None:
    """When something with this time to live expires; None for ever."""
    return None if ttl_seconds is None else now_ns + ttl_seconds * NANOSECONDS
