"""Snapshots on a simulated disk; what reads and verifies them is the code of production."""

import errno
import hashlib
import io
import json
import random
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from sim.disk import SimDisk
from tinsmithd.training.models.snapshot_store import (
    MANIFEST_FILE,
    DiskSnapshotStore,
    Snapshot,
    SnapshotDraft,
)


@dataclass
class Folder:
    """A snapshot's files.

    Attributes:
        synced: It survives the loss of power.
    """

    files: dict[str, bytearray] = field(default_factory=dict)
    synced: bool = False

    def rot(self, rng: random.Random) -> str:
        """Damage it somehow; says how."""
        name = rng.choice(sorted(self.files))
        data = self.files[name]
        how = rng.choice(["flip", "flip", "flip", "cut", "gone"])
        if how == "gone":
            del self.files[name]
        elif how == "cut" or not data:
            del data[len(data) // 2 :]
        else:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return f"{how} {name}"


class SimPath:
    """As much of a `Path` as reading a snapshot needs."""

    def __init__(self, disk: SimDisk, parts: tuple[str, ...] = ()) -> None:
        self._disk = disk
        self._parts = parts

    def __truediv__(self, name: str) -> "SimPath":
        return SimPath(self._disk, (*self._parts, name))

    def read_bytes(self) -> bytes:
        """The whole file."""
        folder, name = self._parts
        try:
            return bytes(self._disk.folders[folder].files[name])
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, "no such file", "/".join(self._parts)) from None

    def open(self, mode: str) -> io.BytesIO:
        """A file to read."""
        return io.BytesIO(self.read_bytes())


class SimDraft:
    """See `SnapshotDraft`."""

    def __init__(self, disk: SimDisk, name: str) -> None:
        self._disk = disk
        self._name = name
        self._files: dict[str, bytearray] = {}

    async def deposit(self) -> str:
        """These ranks have another disk."""
        return ""

    def left(self, files: Mapping[str, int]) -> None:
        """Nothing is."""
        assert not files

    async def write(self, name: str, data: bytes) -> None:
        """Append bytes to a file."""
        await self._disk.do(lambda: self._write(name, data))

    async def finish(self, *, optimizer: bool, step_count: int) -> str:
        """Make it durable."""
        about = {"optimizer": optimizer, "step_count": step_count}
        await self._disk.do(lambda: self._finish(about))
        return self._name

    async def discard(self) -> None:
        """Leave nothing behind."""
        self._files.clear()

    async def _write(self, name: str, data: bytes) -> None:
        await self._disk.pause()
        self._check()
        self._files.setdefault(name, bytearray()).extend(data)

    async def _finish(self, about: dict[str, Any]) -> None:
        await self._disk.pause_sync()
        self._check()
        files = [
            {"name": name, "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in self._files.items()
        ]
        manifest = json.dumps({**about, "files": files})
        sealed = {"sha256": hashlib.sha256(manifest.encode()).hexdigest(), "manifest": manifest}
        self._files[MANIFEST_FILE] = bytearray(json.dumps(sealed).encode())
        folder = self._disk.folders[self._name] = Folder(self._files)
        await self._disk.pause_sync()
        folder.synced = True

    def _check(self) -> None:
        if self._disk.failure:
            raise OSError(errno.ENOSPC, f"disk {self._disk.failure}")


class SimSnapshotStore(DiskSnapshotStore):
    """See `SnapshotStore`."""

    def __init__(self, disk: SimDisk) -> None:
        # Not by that of the real one, which marks a real folder with its format.
        path: Any = SimPath(disk)
        self._folder, self._disk, self.epoch = path, disk, 0

    def begin(self, model_id: str, position: int) -> SnapshotDraft:
        """Begin one."""
        self._disk.folder_count += 1
        return SimDraft(self._disk, self.name(model_id, position, str(self._disk.folder_count)))

    async def read(self, folder: str) -> Snapshot:
        """Read one, whole, and verify it."""
        found: Snapshot = await self._disk.do(self._slowly(lambda: self._read(folder)))
        return found

    async def verify(self, folder: str) -> None:
        """Read what was written, and keep nothing of it."""
        await self._disk.do(self._slowly(lambda: self._verify(folder)))

    async def keep_only(self, folders: Collection[str]) -> None:
        """Remove all others."""
        await self._disk.do(self._slowly(lambda: self._keep_only(folders)))

    async def remove(self, folder: str) -> None:
        """Remove one."""
        await self._disk.do(self._slowly(lambda: self._disk.folders.pop(folder, None)))

    def _slowly(self, work: Callable[[], Any]) -> Callable[[], Awaitable[Any]]:
        async def slow() -> Any:
            await self._disk.pause()
            return work()

        return slow

    def _keep_only(self, folders: Collection[str]) -> None:
        for name in list(self._disk.folders):
            if name not in folders and self.may_remove(name):
                del self._disk.folders[name]
