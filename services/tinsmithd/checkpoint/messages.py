"""Checkpoints as messages of the contract."""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from tinsmith.v1 import checkpoint_service_pb2 as pb
from tinsmithd.checkpoint.catalogue import Checkpoint, read
from tinsmithd.checkpoint.store import Blob
from tinsmithd.convert import types as convert
from tinsmithd.convert.times import timestamp_to_pb
from tinsmithd.domain import content_digest
from tinsmithd.owners import public_id
from tinsmithd.rpc.paging import token_after

PAGE_BYTES = 1024 * 1024
"""A page ends with the checkpoint that takes it over this size."""
LISTED_MAX = 2000
"""Rows that are remembered with what lists have of them, of some 2 KiB each."""
LISTED_CHARACTERS_MAX = 4096
"""A row that knows more of its checkpoint, such as long metadata, is not remembered."""


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
        step_count=checkpoint.step_count,
        ephemeral=checkpoint.ephemeral is not None,
        digest=digest_of(checkpoint),
    )
    for key, value in checkpoint.user_metadata.items():  # all at once takes ten times as long
        message.user_metadata[key] = value
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


class Listed(NamedTuple):
    """A checkpoint as a list has it.

    Attributes:
        number: That of the checkpoint.
        data: A page that has it alone, without files, as on the wire: pages that follow each
            other there are one.
    """

    number: int
    data: bytes


def listed(row: Iterable[Any]) -> Listed:
    """What a list has of a row of the catalogue.

    Raises:
        DataLoss: The row is not what was written (CHECKPOINT_CORRUPT).
    """
    columns = tuple(row)
    *_, record, _ = columns
    is_short = isinstance(record, str) and len(record) <= LISTED_CHARACTERS_MAX
    return _remembered(*columns) if is_short else _listed(*columns)


def _listed(*row: Any) -> Listed:
    checkpoint = read(row)
    page = pb.ListCheckpointsResponse()
    checkpoint_to_pb(checkpoint, with_files=False, new=page.checkpoints.add)
    return Listed(checkpoint.number, page.SerializeToString())


_remembered = functools.lru_cache(maxsize=LISTED_MAX, typed=True)(_listed)
"""By all that a row has: one that is equal to a row that was checked needs no second look."""


def page_to_pb(found: Sequence[Listed], size: int, total: int) -> pb.ListCheckpointsResponse:
    """Write a page: `size` checkpoints, or fewer where their metadata are long."""
    nbytes, token, parts = 0, "", []
    for index, (_, data) in enumerate(found):
        if index == size or nbytes > PAGE_BYTES:
            token = token_after(found[index - 1].number)
            break
        parts.append(data)
        nbytes += len(data)
    response = pb.ListCheckpointsResponse.FromString(b"".join(parts))
    response.total_size, response.next_page_token = total, token
    return response
