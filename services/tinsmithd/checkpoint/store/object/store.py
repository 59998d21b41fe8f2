"""Blobs in an object store, under random names: whole or absent, shared between copies.

    blobs/ab/abcd...    one object per file of a checkpoint

A file is spooled on this server's disk while it comes: there it can be checked before it counts,
and sought in. Of the first `UPLOADS` writes it is uploaded beside that, of others at its end: what
is on its way to the store is in memory, and a store that hangs must not fill that. Its object is
there when it is finished, and counts once the catalogue refers to it. One that nothing refers to is
removed when it was seen to be unused for a while (`grace_s`) on end; whoever finished one has half
of that to commit.
"""

import hashlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

from tinsmithd import failpoints
from tinsmithd.checkpoint.store.failures import RETRY_UNAVAILABLE_S, storage_errors
from tinsmithd.checkpoint.store.interface import Blob, Guard, Staging, Unused
from tinsmithd.checkpoint.store.object.bucket import PAGE, PART_S, Bucket, Upload
from tinsmithd.checkpoint.store.object.log import BLOBS
from tinsmithd.checkpoint.store.spool import Spool, SpoolFolder
from tinsmithd.checkpoint.store.verified import verified
from tinsmithd.errors import Reason, TinsmithError, Unavailable

PROBED = "format"
"""An object that is looked at, whether it is there or not."""
READ_BYTES = 1024 * 1024
UPLOADS = 16
"""Writes whose files are uploaded while they come, and files that are uploaded at their end, at a
time; each keeps some parts in memory."""
UNUSED_MAX = 100_000
"""Maximum number of unused blobs that are remembered; the next look finds the others."""

_log = logging.getLogger(__name__)


class Uploading:
    """How many uploads there may be at a time, of one server."""

    def __init__(self) -> None:
        self.beside = threading.BoundedSemaphore(UPLOADS)
        self.at_the_end = threading.BoundedSemaphore(UPLOADS)


class ObjectStaging(Spool):
    """See `Staging`.

    Args:
        within: Gets a folder for its files.
        bucket: Gets them.
        uploading: Shared by all of a server.
        bytes_max: Maximum number of bytes in all files.
        commit_s: How long after the first object is there it may be published.
        monotonic: What that is counted in.
    """

    def __init__(
        self,
        within: SpoolFolder,
        bucket: Bucket,
        uploading: Uploading,
        bytes_max: int,
        *,
        commit_s: float,
        monotonic: Callable[[], float],
    ) -> None:
        super().__init__(within, bytes_max)
        self._bucket = bucket
        self._uploading = uploading
        self._beside = uploading.beside.acquire(blocking=False)
        self._commit_s = commit_s
        self._monotonic = monotonic
        self._uploads: dict[str, Upload] = {}
        self._keys: dict[str, str] = {}
        self._visible_s: float | None = None
        self._published = False

    @property
    def is_clean(self) -> bool:
        """See `Staging`."""
        return False

    def append(self, name: str, offset: int, data: bytes) -> None:
        """See `Staging`."""
        super().append(name, offset, data)
        if self._beside:
            self._upload(name).write(data)

    def follow(self, deposit: str, names: Sequence[str]) -> None:
        """See `Staging`: what is taken is read once, to be sent and hashed."""

    def _upload(self, name: str) -> Upload:
        upload = self._uploads.get(name)
        if upload is None:
            key = self._keys[name] = secrets.token_hex(16)
            upload = self._uploads[name] = self._bucket.upload(_object(key))
        return upload

    def _give_place_back(self) -> None:
        if self._beside:
            self._beside = False
            self._uploading.beside.release()

    def finish(self, *, durable: bool = True) -> list[Blob]:
        """See `Staging`; what is in the store is durable."""
        self.flush()
        names = sorted(self._sizes)
        failpoints.hit("ckpt_pre_fsync")
        self._visible_s = self._monotonic()
        with storage_errors(), ThreadPoolExecutor(max(len(names), 1)) as beside:
            list(beside.map(self._complete, names))
        self._give_place_back()
        self._finished = [
            Blob(name, self._sizes[name], self._digests[name].hexdigest(), self._keys[name])
            for name in names
        ]
        return list(self._finished)

    def _complete(self, name: str) -> None:
        """Upload the rest of a file, which may be all of it."""
        if name in self._uploads:
            self._uploads[name].close()
        elif not self._uploading.at_the_end.acquire(timeout=PART_S):
            raise _unavailable("the object store of checkpoints takes too little at a time")
        else:
            try:
                self._upload_whole(name)
            finally:
                self._uploading.at_the_end.release()
        del self._uploads[name]
        self._files[name].close()

    def _upload_whole(self, name: str) -> None:
        upload, digest = self._upload(name), None
        if name not in self._digests:  # of what was taken nobody here has read it so far
            digest = self._digests[name] = hashlib.sha256()
        with self.open(name) as file:
            while piece := file.read(READ_BYTES):
                if digest is not None:
                    digest.update(piece)
                upload.write(piece)
        upload.close()

    def publish(self, *, durable: bool = True) -> None:
        """See `Staging`.

        Raises:
            Unavailable: That is too late: others may take the objects for unused by now.
        """
        failpoints.hit("ckpt_pre_rename")
        if self._visible_s is None or self._monotonic() - self._visible_s > self._commit_s:
            raise _unavailable(
                f"the checkpoint was not committed within {self._commit_s:g} s of its upload"
            )
        self._published = True

    def refused(self) -> None:
        """See `Staging`."""
        self._published = False

    def discard(self) -> None:
        """See `Staging`."""
        super().discard()
        try:
            self._discard()
        finally:
            self._give_place_back()

    def _discard(self) -> None:
        if self._published:
            return  # the commit may have been made, even where it failed here
        try:
            for upload in self._uploads.values():
                upload.close()  # what is left open stays in the store, where nobody sees it
            if self._keys:
                self._bucket.delete([_object(key) for key in self._keys.values()])
        except (TinsmithError, OSError) as error:
            _log.warning("objects of a write that ended stay for the next sweep: %s", error)


class ObjectStore:
    """See `Store`; its blobs are objects of a bucket, which others may use at the same time.

    Args:
        bucket: Has them.
        folder: For what is on its way in; this process alone has it.
        grace_s: How long a blob must have been unused before it is removed, seconds.
        monotonic: A clock that nobody sets.

    Raises:
        StoreBusy: Another server has the folder.
    """

    def __init__(
        self,
        bucket: Bucket,
        folder: Path,
        *,
        grace_s: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bucket = bucket
        self._grace_s = grace_s
        self._monotonic = monotonic
        self._unused_s: dict[str, float] = {}
        self._looked_s: float | None = None
        self._sweeping = threading.Lock()
        self._uploading = Uploading()
        self._spool = SpoolFolder(folder)

    @property
    def shared(self) -> bool:
        """See `Store`."""
        return True

    @property
    def empty(self) -> bool:
        """See `Store`."""
        return next(self._bucket.pages(BLOBS), None) is None

    def close(self) -> None:
        """See `Store`."""
        self._spool.close()

    def stage(self, bytes_max: int) -> Staging:
        """See `Store`."""
        return ObjectStaging(
            *(self._spool, self._bucket, self._uploading, bytes_max),
            commit_s=self._grace_s / 2,
            monotonic=self._monotonic,
        )

    def forget_deposits(self) -> None:
        """See `Store`."""
        self._spool.forget_deposits()

    def read(self, blob: Blob) -> Iterator[bytes]:
        """See `Store`."""
        return verified(blob, self._bucket.read(_object(blob.key), blob.size_bytes))

    def url(self, blob: Blob, seconds: float) -> str:
        """See `Store`."""
        return self._bucket.url(_object(blob.key), seconds)

    def sync(self, blobs: Collection[Blob]) -> None:
        """See `Store`; all that is there is durable."""

    def probe(self) -> None:
        """See `Store`."""
        self._bucket.has(PROBED)

    def sweep(
        self, unused: Unused, of: Collection[str] | None = None, guard: Guard = nullcontext
    ) -> int:
        """See `Store`; nothing is removed where another thread does it."""
        if not self._sweeping.acquire(blocking=False):
            return 0
        try:
            return self._sweep(unused)
        finally:
            self._sweeping.release()

    def _sweep(self, unused: Unused) -> int:
        now_s = self._monotonic()
        due = [key for key, since_s in self._unused_s.items() if now_s - since_s >= self._grace_s]
        removed = 0
        for start in range(0, len(due), PAGE):
            keys = due[start : start + PAGE]
            still = unused(keys)
            if still:
                self._bucket.delete([_object(key) for key in still])
            removed += len(still)
            for key in keys:
                del self._unused_s[key]
        if self._looked_s is None or now_s - self._looked_s >= self._grace_s / 2:
            self._look(unused, now_s)
            self._looked_s = now_s
        return removed

    def _look(self, unused: Unused, now_s: float) -> None:
        """Find unused blobs, a page at a time."""
        found: dict[str, float] = {}
        for page in self._bucket.pages(BLOBS):
            for key in unused([about.key.rpartition("/")[2] for about in page]):
                found[key] = self._unused_s.get(key, now_s)
            if len(found) > UNUSED_MAX:
                break
        self._unused_s = found


def _unavailable(message: str) -> Unavailable:
    return Unavailable(message, Reason.CHECKPOINT_UNAVAILABLE, retry_after_s=RETRY_UNAVAILABLE_S)


def _object(key: str) -> str:
    return f"{BLOBS}/{key[:2]}/{key}"
