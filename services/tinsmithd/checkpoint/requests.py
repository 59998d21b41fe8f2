"""Reads the requests of the Checkpoint service that are more than some fields."""

import asyncio
import zlib
from collections.abc import AsyncIterator, Sequence

from tinsmith.v1 import checkpoint_service_pb2 as pb
from tinsmithd import keys
from tinsmithd.checkpoint.catalogue import Writer
from tinsmithd.checkpoint.rules import Header, Write
from tinsmithd.checkpoint.store import Blob
from tinsmithd.convert import types as convert
from tinsmithd.convert.times import ttl_from_pb
from tinsmithd.domain import CheckpointPath
from tinsmithd.errors import DataLoss, InvalidArgument, PermissionDenied, Reason
from tinsmithd.files import is_deposit
from tinsmithd.rpc import flow
from tinsmithd.rpc.budget import Lease

PIECE_BYTES_MAX = 4 * 1024 * 1024
WRITER_CHARACTERS_MAX = 128
LEASES_MAX = 1000
"""Leases of one kind in one call."""


async def read_header(requests: AsyncIterator[pb.WriteCheckpointRequest], rank_max: int) -> Header:
    """The first message of a write: what the checkpoint says of itself, and whose it will be."""
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
    path = convert.path_from_pb(header.checkpoint_path, "header.checkpoint_path")
    return Header(
        path=path.of(keys.current().account),
        base_model=header.base_model,
        tuning=convert.tuning_from_pb(header, "header.", rank_max),
        step_count=header.step_count,
        ttl_seconds=ttl_from_pb(header.ttl if header.HasField("ttl") else None, "header.ttl"),
        overwrite=header.overwrite,
        user_metadata=convert.metadata_from_pb(header.user_metadata, "header.user_metadata"),
        writer=writer_from_pb(header, "header."),
        request_id=convert.request_id_from_pb(header.request_id, "header.request_id"),
        ephemeral=header.ephemeral,
        lease_id=convert.lease_id_from_pb(header.lease_id, "header.lease_id"),
        deposit=_deposit(header),
    )


def _deposit(header: pb.WriteCheckpointHeader) -> str:
    if header.deposit and not is_deposit(header.deposit):
        raise InvalidArgument("header.deposit", "no 32 lower-case hex digits", Reason.INVALID_NAME)
    if header.deposit:
        _check_is_server("header.deposit")
    return header.deposit


def leases_from_pb(leases: Sequence[pb.Lease], field: str) -> list[tuple[CheckpointPath, str]]:
    """Paths and ids of leases of the caller's."""
    convert.check_count(field, leases, "leases_max", LEASES_MAX)
    return [
        (
            convert.path_from_pb(lease.checkpoint_path, f"{field}[{index}].checkpoint_path").of(
                keys.current().account
            ),
            convert.lease_id_from_pb(lease.lease_id, f"{field}[{index}].lease_id"),
        )
        for index, lease in enumerate(leases)
    ]


def writer_from_pb(
    message: pb.WriteCheckpointHeader | pb.ReleaseModelsRequest, where: str
) -> Writer | None:
    """Who writes; None where nobody else may write in its place."""
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
    _check_is_server(f"{where}writer")
    return Writer(message.writer, message.writer_epoch, where)


def _check_is_server(field: str) -> None:
    """Refuse what only servers among themselves may say."""
    if not keys.current().is_server:
        message = f"{field} is for the servers of the cluster among themselves"
        raise PermissionDenied(message, Reason.PERMISSION_DENIED)


async def read_pieces(
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
            name, offset, data = piece.file_name, piece.offset, piece.data
            if write.keeps(name, len(data)):
                write.append(name, offset, data)  # into memory: a thread would cost more
            else:
                await asyncio.to_thread(write.append, name, offset, data)
            del data
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
