"""Files of a checkpoint on their way from the Checkpoint server to whoever has a URL of them."""

import zlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from tinsmith.errors import InternalError
from tinsmith.v1 import checkpoint_service_pb2 as pb
from tinsmithd.gateway.cluster import CHECKPOINT, Cluster


class Slots:
    """Bounds how many downloads there are at once.

    Args:
        most: How many.
    """

    def __init__(self, most: int) -> None:
        self._free = most

    def take(self) -> bool:
        """Take one; False where there is none."""
        if self._free:
            self._free -= 1
            return True
        return False

    def give_back(self) -> None:
        """Give one back."""
        self._free += 1


class FileStream:
    """Reads files one after the other, over as many connections as it takes.

    Args:
        cluster: Where from.
        found: The checkpoint; only its content as of now is read.
        files: Those to read, in the order of their names.
    """

    def __init__(
        self, cluster: Cluster, found: pb.Checkpoint, files: Sequence[pb.CheckpointFile]
    ) -> None:
        self._cluster = cluster
        self._found = found
        self.files = files
        self._request = pb.ReadCheckpointRequest(
            checkpoint_path=found.checkpoint_path,
            file_names=[each.name for each in files],
            checkpoint_digest=found.digest,
        )
        self._call: Any = None

    async def of(self, file: pb.CheckpointFile) -> AsyncIterator[bytes]:
        """The bytes of the next file.

        Raises:
            TinsmithError: They cannot be read, or came damaged.
        """
        sent = 0
        while sent < file.size_bytes:
            piece = await self._cluster.asking("download", self._piece, service=CHECKPOINT)
            if piece is None:
                raise InternalError(f"{file.name} ended at {sent} of {file.size_bytes} bytes")
            damaged = zlib.crc32(piece.data) != piece.crc32
            if damaged or piece.file_name != file.name or piece.offset != sent:
                raise InternalError(f"{file.name} was damaged on its way, at {sent}")
            sent += len(piece.data)
            self._request.offset += len(piece.data)
            if sent == file.size_bytes and file is self.files[-1]:
                await self._end(file)
            yield piece.data

    async def _end(self, file: pb.CheckpointFile) -> None:
        # What the server says last is whether all was as it was saved: nobody has it all before.
        if await self._cluster.asking("download", self._piece, service=CHECKPOINT):
            raise InternalError(f"{file.name} has more bytes than it should")

    async def _piece(self) -> pb.CheckpointPiece | None:
        """The next piece that has bytes, None at the end; after a failure, from a new call."""
        try:
            if self._call is None:
                self._call = (await self._cluster.checkpoint()).ReadCheckpoint(self._request)
            while True:
                response = await self._call.read()
                if not isinstance(response, pb.ReadCheckpointResponse):
                    return None
                if response.HasField("piece") and response.piece.data:
                    return response.piece
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Read no more."""
        if self._call is not None:
            self._call.cancel()
            self._call = None
