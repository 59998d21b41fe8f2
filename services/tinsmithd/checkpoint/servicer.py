"""The face of the Checkpoint service: parse, call the keeper, encode. No rule lives here."""

import asyncio
import zlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any, TypeVar

from tinsmith.v1 import checkpoint_service_pb2 as pb
from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceServicer
from tinsmithd import keys, tracing
from tinsmithd.checkpoint.catalogue import Checkpoint
from tinsmithd.checkpoint.export import exported_files, tar_of
from tinsmithd.checkpoint.messages import checkpoint_to_pb, digest_of, format_of, listed, page_to_pb
from tinsmithd.checkpoint.requests import (
    LEASES_MAX,
    PIECE_BYTES_MAX,
    WRITER_CHARACTERS_MAX,
    leases_from_pb,
    read_header,
    read_pieces,
    writer_from_pb,
)
from tinsmithd.checkpoint.rules import Keeper
from tinsmithd.checkpoint.segments import Segment, check_offset, pieces_from
from tinsmithd.checkpoint.watchers import Watchers
from tinsmithd.config import CheckpointConfig
from tinsmithd.convert import types as convert
from tinsmithd.convert.limits import limits_to_pb, server_version
from tinsmithd.convert.times import duration_to_pb, ttl_from_pb
from tinsmithd.domain import CheckpointPath
from tinsmithd.errors import (
    FailedPrecondition,
    InvalidArgument,
    Reason,
)
from tinsmithd.owners import ANY_OWNER
from tinsmithd.rpc import flow
from tinsmithd.rpc.budget import Budget
from tinsmithd.rpc.paging import PAGE_SIZE_MAX, page_of

T = TypeVar("T")

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

    async def _path(self, said: str, field: str) -> CheckpointPath:
        """The path that the caller means: one of its own, or if it sees all, of anybody."""
        path, caller = convert.path_from_pb(said, field), keys.current()
        own = path.of(caller.account)
        if not caller.sees_all:
            return own
        return await asyncio.to_thread(self._keeper.catalogue.anybodys, own)

    def _stored_max(self) -> int:
        """Bytes that the caller's tenant may have stored; 0: any number."""
        setting = self._config.tenant_stored_bytes_max
        return keys.current().limit("tenant_stored_bytes_max", setting)

    async def GetCheckpoint(
        self, request: pb.GetCheckpointRequest, context: Any
    ) -> pb.GetCheckpointResponse:
        """Return what is known of one checkpoint."""
        path = await self._path(request.checkpoint_path, "checkpoint_path")
        lease_id = convert.lease_id_from_pb(request.lease_id, "lease_id")
        ttl = request.download_url_ttl if request.HasField("download_url_ttl") else None
        ttl_s = min(ttl_from_pb(ttl, "download_url_ttl") or 0, self._config.download_url_ttl_s_max)
        found = await asyncio.to_thread(self._keeper.get, path, lease_id)
        urls = await asyncio.to_thread(self._keeper.urls, found, ttl_s) if ttl_s else []
        return pb.GetCheckpointResponse(checkpoint=checkpoint_to_pb(found, urls=urls))

    async def ListCheckpoints(
        self, request: pb.ListCheckpointsRequest, context: Any
    ) -> pb.ListCheckpointsResponse:
        """Return a page of checkpoints, newest first."""
        asked = page_of(request.page_size, request.page_token)
        kind = convert.kind_from_pb(request.kind, "kind") if request.kind else None
        owner = keys.current().search

        def page() -> pb.ListCheckpointsResponse:
            found, total = self._keeper.catalogue.page_of(
                listed,
                owner=owner,
                model_id=request.model_id,
                kind=kind,
                before=asked.below,
                size=asked.size + 1,
            )
            return page_to_pb(found, asked.size, total)

        return await asyncio.to_thread(page)

    async def UpdateCheckpoint(
        self, request: pb.UpdateCheckpointRequest, context: Any
    ) -> pb.UpdateCheckpointResponse:
        """Change time to live or metadata."""
        path = await self._path(request.checkpoint_path, "checkpoint_path")
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
        path = await self._path(request.checkpoint_path, "checkpoint_path")
        await asyncio.to_thread(self._keeper.catalogue.delete, path)
        return pb.DeleteCheckpointResponse()

    async def CopyCheckpoint(
        self, request: pb.CopyCheckpointRequest, context: Any
    ) -> pb.CopyCheckpointResponse:
        """Copy a checkpoint to another name."""
        source = await self._path(request.source_checkpoint_path, "source_checkpoint_path")
        destination = convert.path_from_pb(
            request.destination_checkpoint_path, "destination_checkpoint_path"
        ).of(keys.current().account)
        ttl_s = ttl_from_pb(request.ttl if request.HasField("ttl") else None, "ttl")
        request_id = convert.request_id_from_pb(request.request_id, "request_id")
        copied = await asyncio.to_thread(
            self._keeper.copy, source, destination, ttl_s, request_id, self._stored_max()
        )
        return pb.CopyCheckpointResponse(checkpoint=checkpoint_to_pb(copied))

    async def ReadCheckpoint(  # type: ignore[override]  # grpc.aio's form of the method
        self, request: pb.ReadCheckpointRequest, context: Any
    ) -> AsyncIterator[pb.ReadCheckpointResponse]:
        """Stream the files of a checkpoint."""
        path = await self._path(request.checkpoint_path, "checkpoint_path")
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
        header = await read_header(request_iterator, self._rank_max)
        with self._staged.lease(flow.current().peer) as staged:
            write = await asyncio.to_thread(self._keeper.begin, header, self._stored_max())
            try:
                if header.deposit:
                    await asyncio.to_thread(write.follow)
                with tracing.span("write"):
                    promised = await read_pieces(request_iterator, write, staged, self._files_max)
                    if header.deposit:
                        staged.take(await asyncio.to_thread(write.take, promised))
                with tracing.span("commit"):
                    committed = await asyncio.to_thread(write.commit, promised)
                self._watchers.tell(committed)
            except BaseException:
                await asyncio.shield(asyncio.to_thread(write.discard))
                raise
        if write.is_clean:
            write.discard()
        else:  # nobody waits for what a write that was committed leaves on the disk
            asyncio.get_running_loop().run_in_executor(None, write.discard)
        if header.ephemeral:
            self._reclaimable.set()  # the one before is not the newest any more
        return pb.WriteCheckpointResponse(checkpoint=checkpoint_to_pb(committed))

    async def RenewLeases(
        self, request: pb.RenewLeasesRequest, context: Any
    ) -> pb.RenewLeasesResponse:
        """Hold ephemeral checkpoints, and let go of others."""
        leases = leases_from_pb(request.leases, "leases")
        released = leases_from_pb(request.released, "released")
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
        writer = writer_from_pb(request, "")
        kept = await asyncio.to_thread(self._keeper.release, set(request.model_ids), writer)
        self._reclaimable.set()
        return pb.ReleaseModelsResponse(kept_model_ids=kept[:MODEL_IDS_MAX])

    async def WatchCheckpoints(  # type: ignore[override]  # grpc.aio's form of the method
        self, request: pb.WatchCheckpointsRequest, context: Any
    ) -> AsyncIterator[pb.WatchCheckpointsResponse]:
        """Tell of checkpoints as they are committed."""
        kind = convert.kind_from_pb(request.kind, "kind") if request.kind else None
        owner = keys.current().search

        def wants(committed: Checkpoint) -> bool:
            base_model = request.base_model or committed.base_model
            is_there = owner in (ANY_OWNER, committed.path.owner)
            fits = committed.base_model == base_model and kind in (None, committed.path.kind)
            return is_there and fits

        with self._watchers.watching(wants) as watched:
            yield pb.WatchCheckpointsResponse()
            async for committed in watched:
                yield pb.WatchCheckpointsResponse(checkpoint=checkpoint_to_pb(committed))

    async def ExportCheckpoint(  # type: ignore[override]  # grpc.aio's form of the method
        self, request: pb.ExportCheckpointRequest, context: Any
    ) -> AsyncIterator[pb.ExportCheckpointResponse]:
        """Stream an archive of a checkpoint."""
        path = await self._path(request.checkpoint_path, "checkpoint_path")
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
