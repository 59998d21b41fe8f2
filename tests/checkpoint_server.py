"""A Checkpoint server in the process of a test, and what a client does with it."""

import zlib
from pathlib import Path

import grpc

from checkpoints import PATH, Clock, blobs, files, messages, staged
from tinsmith.v1 import checkpoint_service_pb2 as pb
from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub
from tinsmithd.checkpoint.server import CheckpointServer


class Served:
    """A running server and a stub for it."""

    def __init__(
        self, folder: Path, clock: Clock, monotonic: Clock, server: CheckpointServer
    ) -> None:
        self.folder = folder
        self.clock = clock
        self.monotonic = monotonic
        self.server = server
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.port}")
        self.stub = CheckpointServiceStub(self.channel)

    async def write(self, path: str = PATH, seed: int = 0, **header: object) -> pb.Checkpoint:
        """Write a checkpoint; the server's answer."""
        content = files(seed, optimizer="/sampler_weights/" not in path)
        response = await self.stub.WriteCheckpoint(iter(messages(path, content, **header)))
        return response.checkpoint

    async def read(self, path: str = PATH) -> dict[str, bytes]:
        """The files of a checkpoint, each piece checked."""
        got: dict[str, bytes] = {}
        async for response in self.stub.ReadCheckpoint(
            pb.ReadCheckpointRequest(checkpoint_path=path)
        ):
            if response.HasField("piece"):
                piece = response.piece
                assert zlib.crc32(piece.data) == piece.crc32
                assert len(got.setdefault(piece.file_name, b"")) == piece.offset
                got[piece.file_name] += piece.data
        return got

    def leftovers(self) -> list[Path]:
        """What lies in staging."""
        return staged(self.folder)

    def blobs(self) -> list[Path]:
        """Files of all blobs."""
        return blobs(self.folder)
