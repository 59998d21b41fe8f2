"""Reads and writes checkpoints through the Checkpoint server's public API.

Nothing here waits for ever: a call has a deadline, and a stream ends that makes no progress. One
that is only slow is waited for, and a read whose connection breaks goes on where it was. What was
read counts only once all of it is verified.
"""

import asyncio
import contextlib
import functools
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import grpc

from tinsmith.addresses import SPREAD
from tinsmith.keys import Metadata, nothing
from tinsmith.v1 import checkpoint_service_pb2 as pb
from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub
from tinsmithd.checkpoint_client.digests import Digests
from tinsmithd.checkpoint_client.patience import ORDINARY, Patience, progress_within
from tinsmithd.checkpoint_client.reader import CheckpointReader, ReadStream
from tinsmithd.convert import types as convert
from tinsmithd.convert.times import ttl_to_pb
from tinsmithd.domain import (
    DEFAULT_OWNER,
    CheckpointInfo,
    CheckpointKind,
    CheckpointPath,
    content_digest,
)
from tinsmithd.errors import FailedPrecondition, Reason
from tinsmithd.rpc.auth import NO_KEY, ClusterKey
from tinsmithd.rpc.channels import open_aio_channel
from tinsmithd.rpc.status import from_rpc_error
from tinsmithd.saves import NewCheckpoint
from tinsmithd.tls import Certificates

if TYPE_CHECKING:
    from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceAsyncStub

PIECE_BYTES_MAX = 1024 * 1024
"""Small, since a piece that leaves is progress: at 100 kB/s it takes ten seconds."""
IN_FLIGHT_BYTES = 8 * 1024 * 1024
"""Maximum number of bytes that have left this process and not arrived: socket buffers."""
SLOW_BYTES_PER_S = 50_000
"""A way as slow as this still has its time to empty them."""
COMMIT_BYTES_PER_S = 10 * 1024 * 1024
"""A server this slow has its time to sync and to verify what it got."""
LEASES_MAX = 1000
"""As many as the Checkpoint server takes in one request."""
RANK_MAX = 1 << 30
"""The Checkpoint server has checked the rank."""


class CheckpointWriter:
    """One checkpoint on its way: `write` pieces, or say what is in a deposit, then `commit`.

    `cancel` leaves nothing.
    """

    def __init__(
        self,
        stub: "CheckpointServiceAsyncStub",
        header: pb.WriteCheckpointHeader,
        patience: Patience,
        metadata: Metadata | None = None,
    ) -> None:
        self._stub = stub
        self._metadata = metadata
        self._call: Any = None  # until there is something to send: what is silent is ended
        self._header = header
        self._patience = patience
        self._sizes: dict[str, int] = {}
        self._digests = Digests()

    async def write(self, file_name: str, data: bytes) -> None:
        """Append bytes to a file; files come one after the other."""
        await self._open()
        for start in range(0, len(data), PIECE_BYTES_MAX) or (0,):
            part = data[start : start + PIECE_BYTES_MAX]
            offset = self._sizes.setdefault(file_name, 0)
            piece = pb.CheckpointPiece(
                file_name=file_name, offset=offset, data=part, crc32=zlib.crc32(part)
            )
            await self._digests.add(file_name, part)
            await self._send(pb.WriteCheckpointRequest(piece=piece))
            self._sizes[file_name] = offset + len(part)

    async def begin(self, deposit: str) -> None:
        """Say that files are being left in a deposit: the server may read them meanwhile."""
        self._header.deposit = deposit
        await self._open()

    def deposited(self, files: Mapping[str, int]) -> None:
        """Say that the files, with their bytes, are in the deposit; nothing may have been written.

        The server makes their digests, of what it keeps.
        """
        if self._sizes or not self._header.deposit:
            raise RuntimeError("the files of a write come in one way")
        self._sizes = dict(files)

    async def commit(self) -> CheckpointInfo:
        """Make it durable and visible; returns what it is now."""
        await self._open()
        digests = await self._digests.all()
        files = [
            pb.CheckpointFile(name=name, size_bytes=size_bytes, sha256=digests.get(name, b""))
            for name, size_bytes in sorted(self._sizes.items())
        ]
        await self._send(pb.WriteCheckpointRequest(commit=pb.WriteCheckpointCommit(files=files)))
        try:
            async with progress_within(self._commit_s):
                await self._call.done_writing()
                response = await self._call
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            raise await self._failure(error) from error
        return _info(response.checkpoint)

    @property
    def _commit_s(self) -> float:
        # What the server is doing cannot be seen: it gets the rest of the bytes, syncs, verifies.
        size = sum(self._sizes.values())
        in_flight_s = min(size, IN_FLIGHT_BYTES) / SLOW_BYTES_PER_S
        return self._patience.stall_s_max + in_flight_s + size / COMMIT_BYTES_PER_S

    def cancel(self) -> None:
        """Give up; the server discards what it got. Harmless after `commit`."""
        if self._call is not None:
            self._call.cancel()

    async def _open(self) -> None:
        if self._call is None:
            self._call = self._stub.WriteCheckpoint(metadata=self._metadata)
            await self._send(pb.WriteCheckpointRequest(header=self._header))

    async def _send(self, request: pb.WriteCheckpointRequest) -> None:
        try:
            async with progress_within(self._patience.stall_s_max):
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
    """The Checkpoint server, as other servers use it.

    Each call that names a checkpoint is made for the owner in its path.

    Args:
        target: Where it is; several servers with the same checkpoints may be behind it.
        patience: How long it is waited for.
        key: What this process shows.
        certificates: By what both sides know each other; None is plain text.

    Attributes:
        writer_name, writer_epoch: Fence off a Training server that was replaced.
    """

    def __init__(
        self,
        target: str,
        patience: Patience = ORDINARY,
        key: ClusterKey = NO_KEY,
        *,
        certificates: Certificates | None = None,
    ) -> None:
        self.writer_name, self.writer_epoch = "", 0
        self._patience = patience
        self._key = key
        shown = (lambda method: key.metadata()) if key.is_set else nothing
        self._channel = open_aio_channel(target, shown, certificates=certificates, more=(SPREAD,))
        self._stub = CheckpointServiceStub(self._channel)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    def writer(self, new: NewCheckpoint) -> CheckpointWriter:
        """Begin a checkpoint."""
        options = new.options
        header = pb.WriteCheckpointHeader(
            checkpoint_path=str(options.path),
            base_model=new.base_model,
            **convert.tuning_to_pb(new.tuning),
            step_count=new.step_count,
            ttl=ttl_to_pb(options.ttl_seconds),
            overwrite=options.overwrite,
            user_metadata=dict(options.user_metadata),
            request_id=options.request_id,
            ephemeral=options.ephemeral,
            lease_id=options.lease_id,
            writer=self.writer_name,
            writer_epoch=self.writer_epoch,
        )
        metadata = self._key.shown_for(options.path.owner)
        return CheckpointWriter(self._stub, header, self._patience, metadata)

    async def get(self, path: CheckpointPath, lease_id: str = "") -> CheckpointInfo:
        """What a path means now; if it is ephemeral, it is held with that lease.

        Raises:
            NotFound: Nothing (CHECKPOINT_NOT_FOUND).
            Unavailable: The server does not answer (CHECKPOINT_UNAVAILABLE).
        """
        request = pb.GetCheckpointRequest(checkpoint_path=str(path), lease_id=lease_id)
        found = await self._ask(self._stub.GetCheckpoint, request, path.owner)
        return _info(found.checkpoint)

    async def release_models(self, model_ids: Sequence[str]) -> Sequence[str]:
        """Say which models are gone; returns those that have ephemeral checkpoints of this cluster.

        Ids are those inside, see `owners`.

        Raises:
            FailedPrecondition: This process was replaced (STALE_EPOCH).
            Unavailable: The server does not answer (CHECKPOINT_UNAVAILABLE).
        """
        request = pb.ReleaseModelsRequest(
            model_ids=model_ids, writer=self.writer_name, writer_epoch=self.writer_epoch
        )
        return list((await self._ask(self._stub.ReleaseModels, request)).kept_model_ids)

    async def renew_leases(
        self, leases: Mapping[str, CheckpointPath], released: Mapping[str, CheckpointPath]
    ) -> float:
        """Renew leases on ephemeral checkpoints and give others back, paths by lease id.

        Returns for how long the leases last, seconds.

        Raises:
            Unavailable: The server does not answer (CHECKPOINT_UNAVAILABLE).
        """
        lease_s = 0.0
        owners = {path.owner for path in (*leases.values(), *released.values())}
        for owner in sorted(owners) or [DEFAULT_OWNER]:
            held, given_back = _leases(leases, owner), _leases(released, owner)
            for start in range(0, max(len(held), len(given_back), 1), LEASES_MAX):
                request = pb.RenewLeasesRequest(
                    leases=held[start : start + LEASES_MAX],
                    released=given_back[start : start + LEASES_MAX],
                )
                lease = (await self._ask(self._stub.RenewLeases, request, owner)).lease
                lease_s = lease.ToNanoseconds() / 1e9
        return lease_s

    async def _ask(self, method: Callable[..., Any], request: Any, owner: str | None = None) -> Any:
        metadata = None if owner is None else self._key.shown_for(owner)
        try:
            return await method(request, timeout=self._patience.answer_s_max, metadata=metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error, Reason.CHECKPOINT_UNAVAILABLE) from error

    @contextlib.asynccontextmanager
    async def reader(
        self, path: CheckpointPath, lease_id: str = ""
    ) -> AsyncIterator[CheckpointReader]:
        """Read a checkpoint for the body of the `async with`.

        Args:
            path: Which one; this call is the only one that asks what the name means.
            lease_id: With which lease it is held, if it is ephemeral.

        Raises:
            NotFound: There is none (CHECKPOINT_NOT_FOUND).
            Unavailable: The server does not answer (CHECKPOINT_UNAVAILABLE).
        """
        request = pb.ReadCheckpointRequest(checkpoint_path=str(path), lease_id=lease_id)
        metadata = self._key.shown_for(path.owner)
        read = functools.partial(self._stub.ReadCheckpoint, metadata=metadata)
        stream = ReadStream(read, request, self._patience)
        try:
            yield CheckpointReader(_info(await stream.checkpoint()), stream)
        finally:
            stream.cancel()

    async def watch(self, base_model: str) -> AsyncGenerator[CheckpointInfo | None]:
        """Checkpoints for Samplers of a base model, as they are committed, while that works.

        First comes None: what is committed after that is told, if this is read soon enough.

        Raises:
            Unavailable: The server is gone, or does not tell (CHECKPOINT_UNAVAILABLE).
        """
        kind = convert.kind_to_pb(CheckpointKind.SAMPLER)
        request = pb.WatchCheckpointsRequest(kind=kind, base_model=base_model)
        call = self._stub.WatchCheckpoints(request)
        try:
            async for response in call:
                yield _info(response.checkpoint) if response.HasField("checkpoint") else None
        except grpc.RpcError as error:
            raise from_rpc_error(error, Reason.CHECKPOINT_UNAVAILABLE) from error
        finally:
            call.cancel()


def check_digest(found: CheckpointInfo, wanted: bytes) -> None:
    """Refuse other content than was asked for, if any was."""
    if wanted and found.digest != wanted:
        raise FailedPrecondition(
            f"{found.path} was replaced: it is not the content any more that was asked for",
            Reason.CHECKPOINT_REPLACED,
        )


def _leases(leases: Mapping[str, CheckpointPath], owner: str) -> list[pb.Lease]:
    return [
        pb.Lease(checkpoint_path=str(path), lease_id=lease_id)
        for lease_id, path in leases.items()
        if path.owner == owner
    ]


def _info(found: pb.Checkpoint) -> CheckpointInfo:
    files = {file.name: file.sha256 for file in found.files}
    path = convert.path_from_pb(found.checkpoint_path, "checkpoint.checkpoint_path")
    return CheckpointInfo(
        path=path.of(found.owner or DEFAULT_OWNER),
        kind=convert.kind_from_pb(found.kind, "checkpoint.kind"),
        base_model=found.base_model,
        tuning=convert.tuning_from_pb(found, "checkpoint.", RANK_MAX),
        step_count=found.step_count,
        size_bytes=found.size_bytes,
        digest=content_digest(files),
        files=files,
    )
