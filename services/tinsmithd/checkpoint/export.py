"""A checkpoint's weights as a tar archive that plain PEFT or transformers reads once unpacked."""

import tarfile
from collections.abc import Iterator, Sequence

from tinsmithd.checkpoint.catalogue import Checkpoint
from tinsmithd.checkpoint.segments import Segment
from tinsmithd.checkpoint.store import Blob
from tinsmithd.state import files as state_files

_OURS = (state_files.STATE_FILE, state_files.OPTIMIZER_FILE)


def exported_files(checkpoint: Checkpoint) -> list[str]:
    """Names of the files that an archive has: all but those that only this service reads."""
    return [blob.name for blob in checkpoint.files if blob.name not in _OURS]


def tar_of(files: Sequence[tuple[Blob, Iterator[bytes]]]) -> list[Segment]:
    """The archive of opened files, never held whole: the same bytes for the same files, always.

    Reading a file raises DataLoss where it is not what was written (CHECKPOINT_CORRUPT).
    """
    segments: list[Segment] = []
    for blob, content in files:
        member = tarfile.TarInfo(blob.name)
        member.size = blob.size_bytes
        member.mode = 0o644
        # PAX differs from plain USTAR only for a file of 8 GiB or more.
        segments.append(Segment.of(member.tobuf(tarfile.PAX_FORMAT)))
        segments.append(Segment(blob.size_bytes, content))
        segments.append(Segment.of(b"\0" * (-blob.size_bytes % tarfile.BLOCKSIZE)))
    return [*segments, Segment.of(b"\0" * (2 * tarfile.BLOCKSIZE))]
