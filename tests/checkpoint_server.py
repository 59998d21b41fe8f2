"""A Checkpoint server in the process of a test, and what a client does with it."""

import contextlib
import zlib
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Self

import grpc

from checkpoints import PATH, Clock, blobs, files, messages, staged
from tinsmith.v1 import checkpoint_service_pb2 as pb
from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub
from tinsmithd.checkpoint.rules import Clocks
from tinsmithd.checkpoint.server import CheckpointServer
from tinsmithd.config import CheckpointConfig


class Served:
    """A server on a free port, on clocks that stand still, and a stub for it."""

    def __init__(self, folder: Path, stop_grace_s: float = 1) -> None:
        self.folder = folder
        self.clock, self.monotonic = Clock(), Clock()
        config = CheckpointConfig(
            listen_address="127.0.0.1:0", data_folder=str(folder), stop_grace_s=stop_grace_s
        )
        self.server = CheckpointServer(config, Clocks(self.clock, self.monotonic))

    async def start(self) -> None:
        """Serve on a free port."""
        await self.server.start()
        self.address = f"127.0.0.1:{self.server.port}"
        self.channel = grpc.aio.insecure_channel(self.address)
        self.stub = CheckpointServiceStub(self.channel)

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, folder: Path) -> AsyncIterator[Self]:
        """One that serves for the body of the `async with`, on clocks that stand still."""
        served = cls(folder)
        await served.start()
        try:
            yield served
        finally:
            await served.channel.close()
            await served.server.stop()

    async def send(
        self, requests: Iterable[pb.WriteCheckpointRequest]
    ) -> pb.WriteCheckpointResponse:
        """Write; the server's answer.

        A message that cannot be sent any more, since the server has refused the call, makes
        grpc.aio raise INTERNAL in place of what the server said (grpc/grpc#36066): it is repeated.
        """
        sent = list(requests)
        while True:
            try:
                return await self.stub.WriteCheckpoint(iter(sent))
            except grpc.aio.AioRpcError as error:
                if "Internal error from Core" not in (error.details() or ""):
                    raise

    async def write(self, path: str = PATH, seed: int = 0, **header: object) -> pb.Checkpoint:
        """Write a checkpoint; the server's answer."""
        content = files(seed, optimizer="/sampler_weights/" not in path)
        return (await self.send(messages(path, content, **header))).checkpoint

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
