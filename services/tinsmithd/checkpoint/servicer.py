"""The face of the Checkpoint service: parse, call the keeper, encode. No rule lives here."""

import asyncio
import zlib
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from tinsmith.v1 import checkpoint_service_pb2 as pb
from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceServicer
from tinsmithd.checkpoint.catalogue import Checkpoint, Writer
from tinsmithd.checkpoint.export import exported_files, tar_of
from tinsmithd.checkpoint.messages import checkpoint_to_pb, digest_of, format_of, page_to_pb
from tinsmithd.checkpoint.rules import Header, Keeper, Write
from tinsmithd.checkpoint.segments import Segment, check_offset, pieces_from
from tinsmithd.checkpoint.store import Blob
from tinsmithd.checkpoint.watchers import Watchers
from tinsmithd.config import CheckpointConfig
from tinsmithd.convert import types as convert
from tinsmithd.convert.limits import limits_to_pb, server_version
from tinsmithd.convert.times import duration_to_pb, ttl_from_pb
from tinsmithd.domain import CheckpointPath
from tinsmithd.errors import DataLoss, FailedPrecondition, InvalidArgument, Reason
from tinsmithd.files import is_deposit
from tinsmithd.rpc import flow
from tinsmithd.rpc.budget import Budget, Lease
from tinsmithd.rpc.intake import off_loop
from tinsmithd.rpc.paging import PAGE_SIZE_MAX, page_of

T = TypeVar("T")

PIECE_BYTES_MAX = 4 * 1024 * 1024
WRITER_CHARACTERS_MAX = 128
LEASES_MAX = 1000
"""Leases of one kind in one call."""
MODEL_IDS_MAX = 1000
UPDATABLE = ("ttl", "user_metadata")


class CheckpointServicer(CheckpointServiceServicer):
    """Serves `tinsmith.v1.CheckpointService`."""

    def __init__(
        self,
        config: CheckpointConfig,
        keeper: Keeper,
        staged: Budget,
        reclaimable: asyncio.Event,
        watchers: Watchers,
    ) -> None:
        self._config = config
        self._keeper = keeper
        self._staged = staged
        self._reclaimable = reclaimable  # set when there may be something that nobody holds
        self._watchers = watchers
        self._files_max = config.files_max
        self._rank_max = config.rank_max

    async def GetCapabilities(
        self, request: pb.CheckpointServiceGetCapabilitiesRequest, context: Any
    ) -> pb.CheckpointServiceGetCapabilitiesResponse:
        """Say what this server can do."""
        limits = limits_to_pb(
            pb.CheckpointLimits,
            self._config,
            page_size_max=PAGE_SIZE_MAX,
            piece_bytes_max=PIECE_BYTES_MAX,
            leases_max=LEASES_MAX,
            model_ids_max=MODEL_IDS_MAX,
            writer_characters_max=WRITER_CHARACTERS_MAX,
        )
        return pb.CheckpointServiceGetCapabilitiesResponse(
            server_version=server_version(),
            limits=limits,
            export_formats=[pb.EXPORT_FORMAT_PEFT_TAR, pb.EXPORT_FORMAT_HF_TAR],
        )

    async def GetCheckpoint(
        self, request: pb.GetCheckpointRequest, context: Any
    ) -> pb.GetCheckpointResponse:
        """Return what is known of one checkpoint."""
        path = convert.path_from_pb(request.checkpoint_path, "checkpoint_path")
        lease_id = convert.lease_id_from_pb(request.lease_id, "lease_id")
        found = await asyncio.to_thread(self._keeper.get, path, lease_id)
        return pb.GetCheckpointResponse(checkpoint=checkpoint_to_pb(found))

    async def ListCheckpoints(
        self, request: pb.ListCheckpointsRequest, context: Any
    ) -> pb.ListCheckpointsResponse:
        """Return a page of checkpoints, newest first."""
        asked = page_of(request.page_size, request.page_token)
        found, total = await asyncio.to_thread(
            self._keeper.catalogue.page,
            model_id=request.model_id,
            kind=convert.kind_from_pb(request.kind, "kind") if request.kind else None,
            before=asked.below,
            size=asked.size + 1,
        )
        return await off_loop(page_to_pb, found, asked.size, total)

    async def UpdateCheckpoint(
        self, request: pb.UpdateCheckpointRequest, context: Any
    ) -> pb.UpdateCheckpointResponse:
        """Change time to live or metadata."""
        path = convert.path_from_pb(request.checkpoint_path, "checkpoint_path")
        named = request.update_mask.paths
        mask = set(named[: len(UPDATABLE)])
        if not mask or len(named) > len(UPDATABLE) or not mask <= set(UPDATABLE):
            raise InvalidArgument("update_mask", f"name some of {', '.join(UPDATABLE)}")
        ttl_s = ttl_from_pb(request.ttl if request.HasField("ttl") else None, "ttl")
        metadata = convert.metadata_from_pb(request.user_metadata, "user_metadata")

        def change(checkpoint: Checkpoint) -> Checkpoint:
            if "ttl" in mask:
                checkpoint = self._keeper.set_ttl(checkpoint, ttl_s)
            if "user_metadata" in mask:
                checkpoint = replace(checkpoint, user_metadata=metadata)
            return checkpoint

        changed = await asyncio.to_thread(self._keeper.update, path, change)
        return pb.UpdateCheckpointResponse(checkpoint=checkpoint_to_pb(changed))

    async def DeleteCheckpoint(
        self, request: pb.DeleteCheckpointRequest, context: Any
    ) -> pb.DeleteCheckpointResponse:
        """Delete a checkpoint."""
        path = convert.path_from_pb(request.checkpoint_path, "checkpoint_path")
        await asyncio.to_thread(self._keeper.catalogue.delete, path)
        return pb.DeleteCheckpointResponse()

    async def CopyCheckpoint(
        self, request: pb.CopyCheckpointRequest, context: Any
    ) -> pb.CopyCheckpointResponse:
        """Copy a checkpoint to another name."""
        source = convert.path_from_pb(request.source_checkpoint_path, "source_checkpoint_path")
        destination = convert.path_from_pb(
            request.destination_checkpoint_path, "destination_checkpoint_path"
        )
        ttl_s = ttl_from_pb(request.ttl if request.HasField("ttl") else None, "ttl")
        request_id = convert.request_id_from_pb(request.request_id, "request_id")
        copied = await asyncio.to_thread(self._keeper.copy, source, destination, ttl_s, request_id)
        return pb.CopyCheckpointResponse(checkpoint=checkpoint_to_pb(copied))

    async def ReadCheckpoint(  # type: ignore[override]  # grpc.aio's form of the method
        self, request: pb.ReadCheckpointRequest, context: Any
    ) -> AsyncIterator[pb.ReadCheckpointResponse]:
        """Stream the files of a checkpoint."""
        path = convert.path_from_pb(request.checkpoint_path, "checkpoint_path")
        convert.check_count("file_names", request.file_names, "files_max", self._files_max)
        names = list(request.file_names)
        lease_id = convert.lease_id_from_pb(request.lease_id, "lease_id")
        digest = _wanted_digest(request)

        def chosen(found: Checkpoint) -> list[str]:
            _check_digest(found, digest)
            return names

        found, files = await asyncio.to_thread(self._keeper.open, path, chosen, lease_id)
        segments = [Segment(blob.size_bytes, content) for blob, content in files]
        check_offset(segments, request.offset)
        yield pb.ReadCheckpointResponse(checkpoint=checkpoint_to_pb(found))
        async for index, offset, data in _threaded(pieces_from(segments, request.offset)):
            name, crc32 = files[index][0].name, zlib.crc32(data)
            piece = pb.CheckpointPiece(file_name=name, offset=offset, data=data, crc32=crc32)
            yield pb.ReadCheckpointResponse(piece=piece)

    async def WriteCheckpoint(
        self, request_iterator: AsyncIterator[pb.WriteCheckpointRequest], context: Any
    ) -> pb.WriteCheckpointResponse:
        """Write a checkpoint."""
        header = await _header(request_iterator, self._rank_max)
        with self._staged.lease(flow.current().peer) as staged:
            write = await asyncio.to_thread(self._keeper.begin, header)
            try:
                promised = await _pieces(request_iterator, write, staged, self._files_max)
                staged.take(await asyncio.to_thread(write.take, promised))
                committed = await asyncio.to_thread(write.commit, promised)
            finally:
                await asyncio.shield(asyncio.to_thread(write.discard))
        self._watchers.tell(committed)
        if header.ephemeral:
            self._reclaimable.set()  # the one before is not the newest any more
        return pb.WriteCheckpointResponse(checkpoint=checkpoint_to_pb(committed))

    async def RenewLeases(
        self, request: pb.RenewLeasesRequest, context: Any
    ) -> pb.RenewLeasesResponse:
        """Hold ephemeral checkpoints, and let go of others."""
        leases = _leases_from_pb(request.leases, "leases")
        released = _leases_from_pb(request.released, "released")
        for index, (_, lease_id) in enumerate(released):
            if not lease_id:
                where = f"released[{index}].lease_id"
                raise InvalidArgument(where, "must be set", Reason.MISSING_FIELD)
        if released:
            await asyncio.to_thread(self._keeper.leases.end, released)
            self._reclaimable.set()
        missing = set(await asyncio.to_thread(self._keeper.renew, leases))
        given = zip(request.leases, leases, strict=True)
        return pb.RenewLeasesResponse(
            lease=duration_to_pb(self._keeper.leases.lease_s),
            not_found_checkpoint_paths=[
                lease.checkpoint_path for lease, (path, _) in given if path in missing
            ],
        )

    async def ReleaseModels(
        self, request: pb.ReleaseModelsRequest, context: Any
    ) -> pb.ReleaseModelsResponse:
        """Take note of models that are gone."""
        convert.check_count("model_ids", request.model_ids, "model_ids_max", MODEL_IDS_MAX)
        writer = _writer(request, "")
        kept = await asyncio.to_thread(self._keeper.release, set(request.model_ids), writer)
        self._reclaimable.set()
        return pb.ReleaseModelsResponse(kept_model_ids=kept[:MODEL_IDS_MAX])

    async def WatchCheckpoints(  # type: ignore[override]  # grpc.aio's form of the method
        self, request: pb.WatchCheckpointsRequest, context: Any
    ) -> AsyncIterator[pb.WatchCheckpointsResponse]:
        """Tell of checkpoints as they are committed."""
        kind = convert.kind_from_pb(request.kind, "kind") if request.kind else None

        def wants(committed: Checkpoint) -> bool:
            base_model = request.base_model or committed.base_model
            return committed.base_model == base_model and kind in (None, committed.path.kind)

        with self._watchers.watching(wants) as watched:
            yield pb.WatchCheckpointsResponse()
            async for committed in watched:
                yield pb.WatchCheckpointsResponse(checkpoint=checkpoint_to_pb(committed))

    async def ExportCheckpoint(  # type: ignore[override]  # grpc.aio's form of the method
        self, request: pb.ExportCheckpointRequest, context: Any
    ) -> AsyncIterator[pb.ExportCheckpointResponse]:
        """Stream an archive of a checkpoint."""
        path = convert.path_from_pb(request.checkpoint_path, "checkpoint_path")
        if request.format not in pb.ExportFormat.values():
            raise InvalidArgument("format", f"unknown format {request.format}")

        digest = _wanted_digest(request)

        def chosen(found: Checkpoint) -> list[str]:
            _check_digest(found, digest)
            fits = format_of(found)
            if request.format not in (pb.EXPORT_FORMAT_UNSPECIFIED, fits):
                what = found.tuning.noun
                message = f"{path} holds {what}: ask for {pb.ExportFormat.Name(fits)}"
                raise InvalidArgument("format", message)
            return exported_files(found)

        found, files = await asyncio.to_thread(self._keeper.open, path, chosen)
        segments = tar_of(files)
        size_bytes = check_offset(segments, request.offset)
        archive = pb.ExportedArchive(
            format=format_of(found), size_bytes=size_bytes, checkpoint=checkpoint_to_pb(found)
        )
        yield pb.ExportCheckpointResponse(archive=archive)
        offset = request.offset
        async for _, _, data in _threaded(pieces_from(segments, offset)):
            piece = pb.ArchivePiece(offset=offset, data=data, crc32=zlib.crc32(data))
            yield pb.ExportCheckpointResponse(piece=piece)
            offset += len(data)


def _wanted_digest(request: pb.ReadCheckpointRequest | pb.ExportCheckpointRequest) -> bytes | None:
    """The content that a reader means, which one that goes on has to say."""
    digest = convert.digest_from_pb(request.checkpoint_digest, "checkpoint_digest")
    if request.offset and digest is None:
        text = "needed by offset"
        raise InvalidArgument("checkpoint_digest", text, Reason.MISSING_FIELD)
    return digest


def _check_digest(found: Checkpoint, wanted: bytes | None) -> None:
    if wanted is not None and digest_of(found) != wanted:
        raise FailedPrecondition(
            f"{found.path} was replaced: it is not the content any more that was asked for",
            Reason.CHECKPOINT_REPLACED,
        )


async def _threaded(source: Iterator[T]) -> AsyncIterator[T]:
    """Pull from a blocking iterator without blocking the event loop."""
    while (found := await asyncio.to_thread(next, source, None)) is not None:
        yield found


async def _header(requests: AsyncIterator[pb.WriteCheckpointRequest], rank_max: int) -> Header:
    first = None
    async for request in requests:
        first = request
        break
    if first is None or first.WhichOneof("content") != "header":
        message = "the first message must have header"
        raise InvalidArgument("header", message, Reason.MALFORMED_STREAM)
    header = first.header
    if not header.base_model:
        raise InvalidArgument("header.base_model", "must be set", Reason.MISSING_FIELD)
    if header.step_count < 0:
        raise InvalidArgument("header.step_count", "is below 0")
    return Header(
        path=convert.path_from_pb(header.checkpoint_path, "header.checkpoint_path"),
        base_model=header.base_model,
        tuning=convert.tuning_from_pb(header, "header.", rank_max),
        step_count=header.step_count,
        ttl_seconds=ttl_from_pb(header.ttl if header.HasField("ttl") else None, "header.ttl"),
        overwrite=header.overwrite,
        user_metadata=convert.metadata_from_pb(header.user_metadata, "header.user_metadata"),
        writer=_writer(header, "header."),
        request_id=convert.request_id_from_pb(header.request_id, "header.request_id"),
        ephemeral=header.ephemeral,
        lease_id=convert.lease_id_from_pb(header.lease_id, "header.lease_id"),
        deposit=_deposit(header),
    )


def _deposit(header: pb.WriteCheckpointHeader) -> str:
    if header.deposit and not is_deposit(header.deposit):
        raise InvalidArgument("header.deposit", "no 32 lower-case hex digits", Reason.INVALID_NAME)
    return header.deposit


def _leases_from_pb(leases: Sequence[pb.Lease], field: str) -> list[tuple[CheckpointPath, str]]:
    convert.check_count(field, leases, "leases_max", LEASES_MAX)
    return [
        (
            convert.path_from_pb(lease.checkpoint_path, f"{field}[{index}].checkpoint_path"),
            convert.lease_id_from_pb(lease.lease_id, f"{field}[{index}].lease_id"),
        )
        for index, lease in enumerate(leases)
    ]


def _writer(
    message: pb.WriteCheckpointHeader | pb.ReleaseModelsRequest, where: str
) -> Writer | None:
    if message.writer_epoch < 0:
        raise InvalidArgument(f"{where}writer_epoch", "is below 0")
    limit = "writer_characters_max"
    convert.check_count(f"{where}writer", message.writer, limit, WRITER_CHARACTERS_MAX)
    if not message.writer:
        if message.writer_epoch:
            # A fence that nobody is behind would be taken for one.
            text = "must be set with writer_epoch"
            raise InvalidArgument(f"{where}writer", text, Reason.MISSING_FIELD)
        return None
    return Writer(message.writer, message.writer_epoch, where)


async def _pieces(
    requests: AsyncIterator[pb.WriteCheckpointRequest],
    write: Write,
    staged: Lease,
    files_max: int,
) -> list[Blob]:
    """Take all pieces in; returns the files that the commit promises."""
    promised: list[Blob] | None = None
    async for request in requests:
        if promised is not None:
            message = "nothing may follow the commit"
            raise InvalidArgument("commit", message, Reason.MALFORMED_STREAM)
        case = request.WhichOneof("content")
        if case == "piece":
            _check_piece(request.piece)
            piece = request.piece
            staged.take(len(piece.data))
            await asyncio.to_thread(write.append, piece.file_name, piece.offset, piece.data)
            flow.current().handed_over()
            del piece
        elif case == "commit":
            convert.check_count("commit.files", request.commit.files, "files_max", files_max)
            promised = [
                Blob(file.name, file.size_bytes, file.sha256.hex()) for file in request.commit.files
            ]
        else:
            message = f"expected piece or commit, got {case or 'nothing'}"
            raise InvalidArgument(case or "content", message, Reason.MALFORMED_STREAM)
    if promised is None:
        message = "the stream ended without commit"
        raise InvalidArgument("commit", message, Reason.MALFORMED_STREAM)
    return promised


def _check_piece(piece: pb.CheckpointPiece) -> None:
    convert.check_count("piece.data", piece.data, "piece_bytes_max", PIECE_BYTES_MAX)
    if zlib.crc32(piece.data) != piece.crc32:
        message = f"piece at {piece.offset} of {piece.file_name[:100]!r} was damaged on its way"
        raise DataLoss(message, Reason.CHECKPOINT_CORRUPT)
