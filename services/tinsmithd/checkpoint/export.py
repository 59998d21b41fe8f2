"""A checkpoint's weights as a tar archive that plain PEFT or transformers reads once unpacked."""

import tarfile
from collections.abc import Iterator, Sequence

from tinsmithd.checkpoint.catalogue import Checkpoint
from tinsmithd.checkpoint.store import Blob
from tinsmithd.state import files as state_files

_OURS = (state_files.STATE_FILE, state_files.OPTIMIZER_FILE)


def exported_files(checkpoint: Checkpoint) -> list[str]:
    """Names of the files that an archive has: all but those that only this service reads."""
    return [blob.name for blob in checkpoint.files if blob.name not in _OURS]


def tar_of(files: Sequence[tuple[Blob, Iterator[bytes]]]) -> Iterator[bytes]:
    """The archive of opened files, piece by piece: the same bytes every time, never held whole.

    Raises:
        DataLoss: A file is not what was written (CHECKPOINT_CORRUPT).
    """
    for blob, content in files:
        member = tarfile.TarInfo(blob.name)
        member.size = blob.size_bytes
        member.mode = 0o644
        # PAX differs from plain USTAR only for a file of 8 GiB or more.
        yield member.tobuf(tarfile.PAX_FORMAT)
        yield from content
        yield b"\0" * (-blob.size_bytes % tarfile.BLOCKSIZE)
    yield b"\0" * (2 * tarfile.BLOCKSIZE)
