"""The log that Checkpoint servers share, in an object store.

    format                              which log this is; made once
    log/00000000000000000000            made with it; stands for all that may be gone, see below
    log/00000000000000000042            an entry; made by whoever is first
    catalogue/00000000000000000040-81   a snapshot at a position, and the bytes of the log so far

An entry is made with a conditional put, so its position is decided once. A store that takes such a
put for any other one is refused: there, servers would overwrite each other's entries. Removing
entries would undo that for whoever has not read them: they stay for `KEPT_S` after a snapshot that
has them, by the store's own clock, and whoever was away for longer than a part of that looks
whether the entry that it read last is still there.

A store that loses objects behind our back, as by a rule of its bucket, must not be taken for one
that never had them: sweeps would remove all blobs that nothing refers to. So where there is neither
format nor log, there may be no blob.
"""

import json
import secrets
from collections.abc import Iterable, Iterator
from datetime import timedelta

from tinsmithd.checkpoint.store.interface import StoreUnusable
from tinsmithd.checkpoint.store.log import Snapshot
from tinsmithd.checkpoint.store.object.bucket import PAGE, Bucket, Object
from tinsmithd.formats import check_known

FORMAT = 1
FORMAT_KEY = "format"
LOG = "log"
BLOBS = "blobs"
CATALOGUE = "catalogue"
KEPT_S = 24 * 3600.0
"""How long entries stay after a snapshot that stands for them."""


class ObjectLog:
    """See `Log`; its first server makes it.

    Raises:
        FormatUnknown: A later release made it.
        StoreUnusable: It is none, or the store knows no conditional put.
        Unavailable: The store does not answer.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._identity = self._open()

    def _open(self) -> str:
        found = self._bucket.get(FORMAT_KEY)
        if found is None:
            self._make()
            found = self._bucket.get(FORMAT_KEY)
        try:
            document = json.loads(found or b"")
            version, identity = int(document["format"]), str(document["identity"])
        except (ValueError, KeyError, TypeError):
            message = f"the store cannot be used: its object {FORMAT_KEY!r} is none of this service"
            raise StoreUnusable(message) from None
        check_known("the store of checkpoints", version, FORMAT)
        if self._bucket.create(FORMAT_KEY, found or b""):
            message = (
                "the store cannot be used: it puts an object where one is, though it was asked"
            )
            raise StoreUnusable(f"{message} to put it only where none is (If-None-Match: *)")
        return identity

    def _make(self) -> None:
        self._check_no_blobs(FORMAT_KEY)
        self._bucket.create(_entry(0), b"")
        document = {"format": FORMAT, "identity": secrets.token_hex(16)}
        self._bucket.create(FORMAT_KEY, json.dumps(document).encode())

    def _check_no_blobs(self, lacks: str) -> None:
        if any(self._bucket.pages(BLOBS)) and self._bucket.get(lacks) is None:
            message = f"the store cannot be used: it has files of checkpoints, and no {lacks}"
            raise StoreUnusable(f"{message}: restore what it lost, or name another prefix")

    @property
    def identity(self) -> str:
        """See `Log`."""
        return self._identity

    def append(self, position: int, entry: bytes) -> bool:
        """See `Log`."""
        return self._bucket.create(_entry(position), entry)

    def read(self, position: int) -> bytes | None:
        """See `Log`."""
        return self._bucket.get(_entry(position))

    def has(self, position: int) -> bool:
        """See `Log`."""
        return self._bucket.has(_entry(position))

    def first_after(self, position: int) -> int | None:
        """See `Log`."""
        found = next(self._bucket.pages(LOG, after=_entry(position)), None)
        if found is not None:
            return min(int(about.key.rpartition("/")[2]) for about in found)
        if not position:
            self._check_no_blobs(_entry(0))
        return None

    def newest_snapshot(self) -> Snapshot | None:
        """See `Log`."""
        found = self._snapshots()
        return found[-1][0] if found else None

    def _snapshots(self) -> list[tuple[Snapshot, Object]]:
        found = [about for page in self._bucket.pages(CATALOGUE) for about in page]
        return sorted(((_snapshot(about), about) for about in found), key=lambda pair: pair[1].key)

    def read_snapshot(self, snapshot: Snapshot) -> Iterator[bytes]:
        """See `Log`."""
        return self._bucket.read(_catalogue(snapshot), snapshot.size_bytes)

    def write_snapshot(self, snapshot: Snapshot, pieces: Iterable[bytes]) -> None:
        """See `Log`."""
        upload = self._bucket.upload(_catalogue(snapshot))
        for piece in pieces:
            upload.write(piece)
        upload.close()

    def trim(self) -> int:
        """See `Log`."""
        snapshots = self._snapshots()
        if not snapshots:
            return 0
        oldest_kept = snapshots[-1][1].modified - timedelta(seconds=KEPT_S)
        old = [pair for pair in snapshots if pair[1].modified <= oldest_kept]
        if not old:
            return 0
        removed = self._remove_entries(_entry(old[-1][0].position))
        gone = [about.key for _, about in old[:-1]]
        if gone:
            self._bucket.delete(gone)
        return removed + len(gone)

    def _remove_entries(self, last: str) -> int:
        """Remove entries up to one, the oldest first, so that what stays has no gap."""
        removed = 0
        for page in self._bucket.pages(LOG):
            keys = sorted(about.key for about in page if about.key <= last)
            for start in range(0, len(keys), PAGE):
                self._bucket.delete(keys[start : start + PAGE])
            removed += len(keys)
            if len(keys) < len(page):
                break
        return removed


def _entry(position: int) -> str:
    return f"{LOG}/{position:020d}"


def _catalogue(snapshot: Snapshot) -> str:
    return f"{CATALOGUE}/{snapshot.position:020d}-{snapshot.log_bytes}"


def _snapshot(about: Object) -> Snapshot:
    position, _, log_bytes = about.key.rpartition("/")[2].partition("-")
    return Snapshot(int(position), int(log_bytes), about.size_bytes)
