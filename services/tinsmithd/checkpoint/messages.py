"""Checkpoints as messages of the contract."""

import itertools
from collections.abc import Callable, Sequence

from tinsmith.v1 import checkpoint_service_pb2 as pb
from tinsmithd.checkpoint.catalogue import Checkpoint
from tinsmithd.checkpoint.store import Blob
from tinsmithd.convert import types as convert
from tinsmithd.convert.times import timestamp_to_pb
from tinsmithd.domain import content_digest
from tinsmithd.owners import public_id
from tinsmithd.rpc.paging import token_after

PAGE_BYTES = 1024 * 1024
"""A page ends with the checkpoint that takes it over this size."""


def digest_of(checkpoint: Checkpoint) -> bytes:
    """Says what a checkpoint holds, see `Checkpoint.digest` of the contract."""
    return content_digest({blob.name: bytes.fromhex(blob.sha256) for blob in checkpoint.files})


def format_of(found: Checkpoint) -> pb.ExportFormat.ValueType:
    """The format in which a checkpoint can be exported."""
    return pb.EXPORT_FORMAT_PEFT_TAR if found.tuning.is_adapter else pb.EXPORT_FORMAT_HF_TAR


def checkpoint_to_pb(
    checkpoint: Checkpoint,
    *,
    with_files: bool = True,
    urls: Sequence[str] = (),
    new: Callable[..., pb.Checkpoint] = pb.Checkpoint,
) -> pb.Checkpoint:
    """Write what is known of a checkpoint, with a URL for each file where there are any.

    Args:
        checkpoint: Which one.
        with_files: Write what is known of its files, too.
        urls: One for each of them, or none.
        new: Makes the message, such as a new one of a list.
    """
    path = checkpoint.path
    message = new(
        checkpoint_path=str(path),
        model_id=public_id(path.model_id),
        owner=path.owner,
        kind=convert.kind_to_pb(path.kind),
        name=path.name,
        base_model=checkpoint.base_model,
        **convert.tuning_to_pb(checkpoint.tuning),
        create_time=timestamp_to_pb(checkpoint.create_time_s),
        size_bytes=checkpoint.size_bytes,
        user_metadata=checkpoint.user_metadata,
        step_count=checkpoint.step_count,
        ephemeral=checkpoint.ephemeral is not None,
        digest=digest_of(checkpoint),
    )
    if checkpoint.expire_time_s is not None:
        message.expire_time.CopyFrom(timestamp_to_pb(checkpoint.expire_time_s))
    if with_files:
        for blob, url in itertools.zip_longest(checkpoint.files, urls, fillvalue=""):
            assert isinstance(blob, Blob)
            message.files.add(
                name=blob.name,
                size_bytes=blob.size_bytes,
                sha256=bytes.fromhex(blob.sha256),
                download_url=url,
            )
    return message


def page_to_pb(found: Sequence[Checkpoint], size: int, total: int) -> pb.ListCheckpointsResponse:
    """Write a page: `size` checkpoints, or fewer where their metadata are long."""
    response = pb.ListCheckpointsResponse(total_size=total)
    nbytes = 0
    for index, checkpoint in enumerate(found):
        if index == size or nbytes > PAGE_BYTES:
            response.next_page_token = token_after(found[index - 1].number)
            break
        written = checkpoint_to_pb(checkpoint, with_files=False, new=response.checkpoints.add)
        nbytes += written.ByteSize()
    return response
