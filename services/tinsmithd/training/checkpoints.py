"""The Checkpoint server as the Training server uses it: a client of its public API."""

import asyncio
import hashlib
import zlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from tinsmith.v1 import checkpoint_service_pb2 as pb
from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub
from tinsmithd.convert import types as convert
from tinsmithd.domain import CheckpointKind, CheckpointPath, Tuning
from tinsmithd.errors import DataLoss, Reason
from tinsmithd.rpc.channels import open_aio_channel
from tinsmithd.rpc.status import from_rpc_error
from tinsmithd.training.works import SaveOptions

if TYPE_CHECKING:
    from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceAsyncStub

PIECE_BYTES_MAX = 1024 * 1024


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of itself before its files are read."""

    path: CheckpointPath
    kind: CheckpointKind
    base_model: str
    tuning: Tuning
    step_count: int


class CheckpointWriter:
    """One checkpoint on its way: `open`, `write` pieces, `commit`; `cancel` leaves nothing."""

    def __init__(
        self, stub: "CheckpointServiceAsyncStub", header: pb.WriteCheckpointHeader
    ) -> None:
        self._call = stub.WriteCheckpoint()
        self._header = header
        self._opened = False
        self._sizes: dict[str, int] = {}
        self._digests: dict[str, hashlib._Hash] = {}

    async def write(self, file_name: str, data: bytes) -> None:
        """Append bytes to a file; files come one after the other."""
        await self._open()
        for start in range(0, len(data), PIECE_BYTES_MAX) or (0,):
            part = data[start : start + PIECE_BYTES_MAX]
            offset = self._sizes.setdefault(file_name, 0)
            piece = pb.CheckpointPiece(
                file_name=file_name, offset=offset, data=part, crc32=zlib.crc32(part)
            )
            await self._send(pb.WriteCheckpointRequest(piece=piece))
            self._sizes[file_name] = offset + len(part)
            self._digests.setdefault(file_name, hashlib.sha256()).update(part)

    async def commit(self) -> int:
        """Make it durable and visible; returns its size in bytes."""
        await self._open()
        files = [
            pb.CheckpointFile(name=n, size_bytes=self._sizes[n], sha256=self._digests[n].digest())
            for n in sorted(self._sizes)
        ]
        await self._send(pb.WriteCheckpointRequest(commit=pb.WriteCheckpointCommit(files=files)))
        try:
            await self._call.done_writing()
            response = await self._call
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            raise await self._failure(error) from error
        return int(response.checkpoint.size_bytes)

    @property
    def size_bytes(self) -> int:
        """Bytes written so far."""
        return sum(self._sizes.values())

    def cancel(self) -> None:
        """Give up; the server discards what it got."""
        self._call.cancel()

    async def _open(self) -> None:
        if not self._opened:
            self._opened = True
            await self._send(pb.WriteCheckpointRequest(header=self._header))

    async def _send(self, request: pb.WriteCheckpointRequest) -> None:
        try:
            await self._call.write(request)
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            raise await self._failure(error) from error

    async def _failure(self, error: Exception) -> Exception:
        # A write on a call that the server ended says only that it ended; the status says why.
        if not isinstance(error, grpc.aio.AioRpcError):
            try:
                await self._call
            except grpc.aio.AioRpcError as cause:
                error = cause
        if isinstance(error, grpc.RpcError):
            return from_rpc_error(error, Reason.CHECKPOINT_UNAVAILABLE)
        return error


class CheckpointClient:
    """Writes and reads checkpoints through the Checkpoint server.

    Attributes:
        writer_name, writer_epoch: Fence off a Training server that was replaced.
    """

    def __init__(self, target: str) -> None:
        self.writer_name, self.writer_epoch = "", 0
        self._channel = open_aio_channel(target)
        self._stub = CheckpointServiceStub(self._channel)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    def writer(
        self, options: SaveOptions, base_model: str, tuning: Tuning, step_count: int
    ) -> CheckpointWriter:
        """Begin a checkpoint."""
        header = pb.WriteCheckpointHeader(
            path=str(options.path),
            base_model=base_model,
            **convert.tuning_to_pb(tuning),
            step_count=step_count,
            ttl_seconds=options.ttl_seconds,
            overwrite=options.overwrite,
            user_metadata=dict(options.user_metadata),
            request_id=options.request_id,
            writer=self.writer_name,
            writer_epoch=self.writer_epoch,
            ephemeral=options.ephemeral,
        )
        return CheckpointWriter(self._stub, header)

    async def get(self, path: CheckpointPath) -> CheckpointInfo:
        """What a checkpoint is.

        Raises:
            NotFound: There is none (CHECKPOINT_NOT_FOUND).
            Unavailable: The server cannot be reached.
        """
        try:
            response = await self._stub.GetCheckpoint(
                pb.GetCheckpointRequest(path=str(path)), timeout=30
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error, Reason.CHECKPOINT_UNAVAILABLE) from error
        found = response.checkpoint
        return CheckpointInfo(
            path=path,
            kind=convert.kind_from_pb(found.kind, "checkpoint.kind"),
            base_model=found.base_model,
            tuning=convert.tuning_from_pb(found, "checkpoint.", 1 << 30),
            step_count=found.step_count,
        )

    async def release_models(self, model_ids: Sequence[str]) -> Sequence[str]:
        """Say which models are gone; returns those that have ephemeral checkpoints of this cluster.

        Raises:
            FailedPrecondition: This process was replaced (STALE_EPOCH).
            Unavailable: The server cannot be reached.
        """
        request = pb.ReleaseModelsRequest(
            model_ids=model_ids, writer=self.writer_name, writer_epoch=self.writer_epoch
        )
        try:
            return list((await self._stub.ReleaseModels(request, timeout=30)).kept_model_ids)
        except grpc.RpcError as error:
            raise from_rpc_error(error, Reason.CHECKPOINT_UNAVAILABLE) from error

    async def read(self, path: CheckpointPath) -> AsyncIterator[tuple[str, bytes]]:
        """The files of a checkpoint, piece by piece; only a normal end means that all is well.

        Raises:
            DataLoss: A checksum does not match (CHECKPOINT_CORRUPT).
        """
        try:
            async for response in self._stub.ReadCheckpoint(
                pb.ReadCheckpointRequest(path=str(path))
            ):
                if response.WhichOneof("content") != "piece":
                    continue
                piece = response.piece
                data = piece.data
                if zlib.crc32(data) != piece.crc32:
                    message = f"{piece.file_name} was damaged on its way"
                    raise DataLoss(message, Reason.CHECKPOINT_CORRUPT)
                yield piece.file_name, data
        except grpc.RpcError as error:
            raise from_rpc_error(error, Reason.CHECKPOINT_UNAVAILABLE) from error
