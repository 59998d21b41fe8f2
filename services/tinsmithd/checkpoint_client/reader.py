"""Reads a checkpoint, over as many connections as it takes."""

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from tinsmith.v1 import checkpoint_service_pb2 as pb
from tinsmithd.checkpoint_client.digests import Digests
from tinsmithd.checkpoint_client.patience import Patience, progress_within
from tinsmithd.domain import CheckpointInfo
from tinsmithd.errors import DataLoss, Reason, TinsmithError
from tinsmithd.rpc.status import from_rpc_error

RECONNECT_INTERVAL_S = 0.2


class CheckpointReader:
    """One checkpoint that is being read.

    Args:
        info: What it is.
        stream: The rest of what the server says.

    Attributes:
        info: What it is. Its name may mean something else by now; what is read stays this one.
    """

    def __init__(self, info: CheckpointInfo, stream: "ReadStream") -> None:
        self.info = info
        self._stream = stream

    async def pieces(self) -> AsyncIterator[tuple[str, bytes]]:
        """The files, piece by piece, once; only a normal end means that all is well.

        Raises:
            DataLoss: Something is not what was saved (CHECKPOINT_CORRUPT).
            Unavailable: The server is gone, or made no progress (CHECKPOINT_UNAVAILABLE).
        """
        digests = Digests(self.info.files)
        sizes = dict.fromkeys(self.info.files, 0)
        while (piece := await self._stream.piece()) is not None:
            name = piece.file_name
            if name not in sizes:
                raise self._corrupt(f"{name[:100]!r} is not one of its files")
            if zlib.crc32(piece.data) != piece.crc32:
                raise self._corrupt(f"{name} was damaged on its way")
            if piece.offset != sizes[name]:
                raise self._corrupt(f"{name} goes on at {piece.offset}, not at {sizes[name]}")
            sizes[name] += len(piece.data)
            await digests.add(name, piece.data)
            yield name, piece.data
        for name, digest in (await digests.all()).items():
            if digest != self.info.files[name]:
                raise self._corrupt(f"{name} does not match its digest")

    def _corrupt(self, what: str) -> DataLoss:
        return DataLoss(f"{self.info.path}: {what}", Reason.CHECKPOINT_CORRUPT)


class ReadStream:
    """The answers of a read, each within a bounded time.

    When the connection breaks, another call goes on at the byte where it ended, as long as the name
    means the same content.

    Args:
        read: The stub's ReadCheckpoint.
        request: What is read; changed while it is.
        patience: How long the server is waited for.
    """

    def __init__(
        self, read: Callable[..., Any], request: pb.ReadCheckpointRequest, patience: Patience
    ) -> None:
        self._begin = read
        self._request = request
        self._patience = patience
        self._call = read(request)
        self._give_up_s: float | None = None
        """When to, by the loop's clock, unless a piece comes; None while the connection is well."""

    async def checkpoint(self) -> pb.Checkpoint:
        """What is read, which comes before the pieces.

        Raises:
            NotFound: There is none (CHECKPOINT_NOT_FOUND).
            Unavailable: The server does not answer (CHECKPOINT_UNAVAILABLE).
        """
        try:
            response = await self._read()
        except grpc.RpcError as error:
            raise from_rpc_error(error, Reason.CHECKPOINT_UNAVAILABLE) from error
        if response is None or not response.HasField("checkpoint"):
            path = self._request.checkpoint_path
            text = f"{path}: the answer does not begin with the checkpoint"
            raise DataLoss(text, Reason.CHECKPOINT_CORRUPT)
        found: pb.Checkpoint = response.checkpoint
        self._request.checkpoint_digest = found.digest
        return found

    async def piece(self) -> pb.CheckpointPiece | None:
        """The next piece; None at the end.

        Raises:
            Unavailable: The server is gone, or made no progress (CHECKPOINT_UNAVAILABLE).
        """
        while True:
            try:
                response = await self._read()
                break
            except grpc.RpcError as error:
                failure = from_rpc_error(error, Reason.CHECKPOINT_UNAVAILABLE)
                if failure.reason is not Reason.CHECKPOINT_UNAVAILABLE:
                    raise failure from error
                await self._go_on(failure)
        if response is None:
            return None
        piece: pb.CheckpointPiece = response.piece
        self._request.offset += len(piece.data)
        self._give_up_s = None
        return piece

    async def _go_on(self, failure: TinsmithError) -> None:
        """Open a call for the rest; whoever asks anew is told what else became of the name."""
        loop = asyncio.get_running_loop()
        if self._give_up_s is None:
            self._give_up_s = loop.time() + self._patience.answer_s_max
        while loop.time() < self._give_up_s:
            self._call = self._begin(self._request)
            try:
                await self.checkpoint()
                return
            except TinsmithError as error:
                if error.reason is not Reason.CHECKPOINT_UNAVAILABLE:
                    raise failure from error
            await asyncio.sleep(RECONNECT_INTERVAL_S)
        raise failure

    async def _read(self) -> Any:
        async with progress_within(self._patience.stall_s_max):
            response = await self._call.read()
        return None if response is grpc.aio.EOF else response

    def cancel(self) -> None:
        """Read no more; harmless after the end."""
        self._call.cancel()
