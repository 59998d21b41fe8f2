"""Downloads a checkpoint as a folder; what came before a connection broke is not sent again."""

import asyncio
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

import grpc

from tinsmith._connection import CHECKPOINT, Connection
from tinsmith.errors import InternalError, InvalidArgumentError, from_rpc_error
from tinsmith.v1 import checkpoint_service_pb2 as pb

Progress = Callable[[int, int], None]
"""Told, on the background loop, how many bytes came and how many there are."""


def _told_nobody(done: int, total: int) -> None:
    """What progress is where nobody looks."""


async def download(
    connection: Connection, path: str, folder: Path, progress: Progress = _told_nobody
) -> Path:
    """Download a checkpoint into a folder, which is made; returns it.

    The archive goes to a file there first, so that memory does not bound its size.
    """
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        await export(connection, path, file, progress)
        file.seek(0)
        await asyncio.to_thread(_unpack, file, folder)
    return folder


async def export(
    connection: Connection, path: str, file: IO[bytes], progress: Progress = _told_nobody
) -> None:
    """Write a checkpoint's archive, a plain tar, to a file that is open at its start."""
    arriving = _Arriving(connection, path, file, progress)
    await connection.retrying("download_checkpoint", arriving.attempt, service=CHECKPOINT)


class _Arriving:
    """An archive that comes in over any number of connections.

    Args:
        connection: Where from.
        path: Of the checkpoint.
        file: Where to.
        progress: Told of each piece.
    """

    def __init__(
        self, connection: Connection, path: str, file: IO[bytes], progress: Progress
    ) -> None:
        self._connection = connection
        self._file = file
        self._progress = progress
        self._request = pb.ExportCheckpointRequest(checkpoint_path=path)
        self._size = 0

    async def attempt(self) -> None:
        """Get what is missing."""
        try:
            await self._receive()
        except grpc.RpcError as error:
            if from_rpc_error(error).reason != "CHECKPOINT_REPLACED":
                raise
            # The name means another content by now, and that is what the user asked for.
            self._request.ClearField("offset")
            self._request.ClearField("checkpoint_digest")
            self._file.seek(0)
            self._file.truncate()
            await self._receive()

    async def _receive(self) -> None:
        stub = await self._connection.checkpoint()
        async for response in stub.ExportCheckpoint(self._request):
            if response.HasField("archive"):
                self._request.checkpoint_digest = response.archive.checkpoint.digest
                self._size = response.archive.size_bytes
                continue
            piece = response.piece
            if piece.offset != self._request.offset or zlib.crc32(piece.data) != piece.crc32:
                raise InternalError(f"the archive was damaged on its way, at {piece.offset}")
            if self._request.offset + len(piece.data) > self._size:
                raise InternalError(f"more than the archive's {self._size} bytes came")
            await asyncio.to_thread(self._file.write, piece.data)
            self._request.offset += len(piece.data)
            self._progress(self._request.offset, self._size)
        if self._request.offset != self._size:
            raise InternalError(f"{self._request.offset} of {self._size} bytes came")


def _unpack(archive: IO[bytes], folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        # Plain tar: one that is packed, or a sparse file in it, could be any size once unpacked.
        with tarfile.open(fileobj=archive, mode="r:") as tar:
            # Not `extractall`: it is safe with a filter only, which Python has since 3.11.4.
            for member in tar:
                name = member.name
                plain = member.isfile() and not member.issparse()
                source = tar.extractfile(member) if plain else None
                if source is None or name != Path(name).name or name == "..":
                    message = f"the archive holds {name}, which is no plain file"
                    raise InvalidArgumentError(message, field="path")
                with source, Path(scratch, name).open("wb") as target:
                    shutil.copyfileobj(source, target)
        for file in sorted(Path(scratch).iterdir()):
            file.replace(folder / file.name)
