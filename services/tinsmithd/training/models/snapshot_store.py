"""States of models on disk: whole and verified, or absent.

    <folder>/<snapshot>/<file>...        as `state_files` has them
    <folder>/<snapshot>/manifest.json    name, size and SHA-256 of each, and a format; written last
    <folder>/format.json                 the newest of these formats
    <folder>/staging/<snapshot>/         a draft; emptied at start

Files are synced before the manifest, the folder before it is renamed into place, and the parent
after. A snapshot counts only once the journal says so: a start removes all others.
"""

import asyncio
import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tinsmithd import failpoints
from tinsmithd.errors import DataLoss, Reason
from tinsmithd.files import file_digest, is_plain_name, sync_file
from tinsmithd.formats import FOLDER_FILE, check_folder
from tinsmithd.training.journal import StoreDamaged
from tinsmithd.training.ranks import Pieces

MANIFEST_FILE = "manifest.json"
FORMAT = 1
"""Of manifests and of the folder. A manifest of the first release says none, and is format 1."""
PIECE_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Snapshot:
    """A state that was read and verified.

    Attributes:
        pieces: Its files, piece by piece.
        optimizer: Whether the optimizer state counts, too.
        step_count: Optimizer steps made.
    """

    pieces: Pieces
    optimizer: bool
    step_count: int


class SnapshotDraft(Protocol):
    """A snapshot on its way in: `write` its files, or have them `left` in its folder."""

    async def deposit(self) -> str:
        """Make the folder in which the ranks may leave all files, unsent; empty: there is none.

        Raises:
            OSError: The disk does not take it.
        """

    def left(self, files: Mapping[str, int]) -> None:
        """Say which files are there, with their bytes; nothing may have been written."""

    async def write(self, name: str, data: bytes) -> None:
        """Append bytes to a file; files come one after the other.

        Raises:
            OSError: The disk does not take it.
        """

    async def finish(self, *, optimizer: bool, step_count: int) -> str:
        """Make it durable; returns its folder, for `SnapshotStore.read`.

        Raises:
            OSError: The disk does not take it.
        """

    async def discard(self) -> None:
        """Leave nothing behind; harmless after `finish`."""


class SnapshotStore(Protocol):
    """Keeps the files of snapshots.

    Attributes:
        epoch: That of this process; set once the journal is claimed, before anything else.
    """

    epoch: int

    def begin(self, model_id: str, position: int) -> SnapshotDraft:
        """Begin one."""

    async def read(self, folder: str) -> Snapshot:
        """Read one, whole, and verify it.

        Raises:
            StoreDamaged: It is gone, or not what was written.
        """

    async def verify(self, folder: str) -> None:
        """Read and verify one, and keep nothing of it.

        Raises:
            StoreDamaged: It is gone, or not what was written.
        """

    async def keep_only(self, folders: Collection[str]) -> None:
        """Remove all others, except those that a process of a higher epoch made."""

    async def remove(self, folder: str) -> None:
        """Remove one; an unknown one is no error."""


class DiskSnapshotDraft:
    """See `SnapshotDraft`."""

    def __init__(self, parent: Path, name: str) -> None:
        self._name = name
        self._parent = parent
        self._staging = parent / "staging" / name
        self._sizes: dict[str, int] = {}
        self._digests: dict[str, Any] = {}
        self._file: Any = None

    async def deposit(self) -> str:
        """Make the folder in which the ranks may leave all files."""
        await asyncio.to_thread(self._staging.mkdir, mode=0o700, parents=True, exist_ok=True)
        return str(self._staging.absolute())

    def left(self, files: Mapping[str, int]) -> None:
        """Say which files are there."""
        self._sizes = dict(files)

    async def write(self, name: str, data: bytes) -> None:
        """Append bytes to a file."""
        await asyncio.to_thread(self._write, name, data)

    async def finish(self, *, optimizer: bool, step_count: int) -> str:
        """Make it durable."""
        about = {"optimizer": optimizer, "step_count": step_count}
        await asyncio.to_thread(self._finish, about)
        return self._name

    async def discard(self) -> None:
        """Leave nothing behind."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # closing writes the buffer, too
                self._file.close()
        await asyncio.to_thread(shutil.rmtree, self._staging, ignore_errors=True)

    def _write(self, name: str, data: bytes) -> None:
        if name not in self._sizes:
            if not is_plain_name(name):
                raise DataLoss(f"{name!r} is no name of a state's file", Reason.CHECKPOINT_CORRUPT)
            self._close()
            self._staging.mkdir(parents=True, exist_ok=True)
            self._file = (self._staging / name).open("xb")
            self._sizes[name], self._digests[name] = 0, hashlib.sha256()
        self._file.write(data)
        self._sizes[name] += len(data)
        self._digests[name].update(data)
        failpoints.hit("snapshot_mid_write")

    def _close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _check_left(self, name: str, size: int) -> None:
        """Take a file that was left as if it had been written."""
        with (self._staging / name).open("rb") as file:
            self._digests[name] = file_digest(file)
            if file.tell() != size:
                raise OSError(errno.EIO, f"{name} has {file.tell()} bytes, not {size}")
            os.fsync(file.fileno())
        failpoints.hit("snapshot_mid_write")

    def _finish(self, about: Mapping[str, Any]) -> None:
        self._close()
        for name in self._sizes.keys() - self._digests.keys():
            self._check_left(name, self._sizes[name])
        files = [
            {"name": name, "size_bytes": size, "sha256": self._digests[name].hexdigest()}
            for name, size in self._sizes.items()
        ]
        about = {"format": FORMAT, **about}
        manifest = json.dumps({**about, "files": files}, indent=1).encode()
        sealed = {"sha256": hashlib.sha256(manifest).hexdigest(), "manifest": manifest.decode()}
        with (self._staging / MANIFEST_FILE).open("xb") as file:
            file.write(json.dumps(sealed).encode())
            file.flush()
            os.fsync(file.fileno())
        sync_file(self._staging)
        failpoints.hit("snapshot_pre_rename")
        os.rename(self._staging, self._parent / self._name)
        sync_file(self._parent)
        failpoints.hit("snapshot_post_rename")


def check_snapshots(folder: Path) -> None:
    """Refuse a folder of snapshots of a later release, and mark it as one of this release.

    Raises:
        FormatUnknown: A later release wrote snapshots there.
    """
    check_folder(folder, "the folder of snapshots", FORMAT)


class DiskSnapshotStore:
    """See `SnapshotStore`; `check_snapshots` comes before it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.epoch = 0

    def begin(self, model_id: str, position: int) -> SnapshotDraft:
        """Begin one."""
        return DiskSnapshotDraft(self._folder, self.name(model_id, position, secrets.token_hex(4)))

    def name(self, model_id: str, position: int, unique: str) -> str:
        """A folder's name; it says which process made it."""
        model = model_id.replace(":", "_").replace("/", "_")  # which not every disk takes
        return f"{self.epoch:08d}-{model}-{position:010d}-{unique}"

    def may_remove(self, name: str) -> bool:
        """Whether no process made it that took over from this one."""
        made, _, _ = name.partition("-")
        return not made.isdigit() or int(made) <= self.epoch

    async def read(self, folder: str) -> Snapshot:
        """Read one, whole, and verify it."""
        return await asyncio.to_thread(self._read, folder)

    async def verify(self, folder: str) -> None:
        """Read and verify one, and keep nothing of it."""
        await asyncio.to_thread(self._verify, folder)

    async def keep_only(self, folders: Collection[str]) -> None:
        """Remove all others."""
        await asyncio.to_thread(self._keep_only, folders)

    async def remove(self, folder: str) -> None:
        """Remove one."""
        await asyncio.to_thread(shutil.rmtree, self._folder / folder, ignore_errors=True)

    def _keep_only(self, folders: Collection[str]) -> None:
        staging, folders = self._folder / "staging", set(folders)
        staging.mkdir(parents=True, exist_ok=True)
        for found in [*self._folder.iterdir(), *staging.iterdir()]:
            known = found == staging or found.name == FOLDER_FILE or found.name in folders
            if not known and self.may_remove(found.name):
                shutil.rmtree(found, ignore_errors=True)

    def _read(self, name: str) -> Snapshot:
        with _damage(name):
            manifest = _manifest(self._folder / name)
            pieces = [
                (about["name"], piece)
                for about in manifest["files"]
                for piece in _verified(self._folder / name, about)
            ]
            return Snapshot(pieces, manifest["optimizer"], manifest["step_count"])

    def _verify(self, name: str) -> None:
        with _damage(name):
            for about in _manifest(self._folder / name)["files"]:
                for _ in _verified(self._folder / name, about):
                    pass


@contextlib.contextmanager
def _damage(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        # The name has the model's id in it.
        short = "-".join((name.partition("-")[0], *name.rsplit("-", 2)[1:]))
        raise StoreDamaged(f"snapshot {short}: {error}") from error


def _manifest(folder: Path) -> Mapping[str, Any]:
    sealed = json.loads((folder / MANIFEST_FILE).read_bytes())
    text = sealed["manifest"]
    if hashlib.sha256(text.encode()).hexdigest() != sealed["sha256"]:
        raise ValueError(f"{MANIFEST_FILE} is damaged")
    manifest: Mapping[str, Any] = json.loads(text)
    if manifest.get("format", FORMAT) != FORMAT:
        raise ValueError(f"{MANIFEST_FILE} has format {manifest['format']}, not {FORMAT}")
    return manifest


def _verified(folder: Path, about: Mapping[str, Any]) -> Iterator[bytes]:
    """The pieces of a file; raises at its end if they are not what was written."""
    digest = hashlib.sha256()
    with (folder / about["name"]).open("rb") as file:
        piece = file.read(PIECE_BYTES)
        yield piece  # of an empty file, too
        digest.update(piece)
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
            yield piece
    if digest.hexdigest() != about["sha256"]:
        raise ValueError(f"{about['name']} is damaged")
