"""Removes the bytes that no checkpoint refers to, where this process alone has the store.

Those that may go are known: the files of checkpoints that went, and of writes that failed; after a
start all files that there are. Which of them stay the catalogue's rows say. A start reads them in
slices, each under the lock for less than a millisecond and with pauses in between, so that nobody
waits for a catalogue of a million rows; from then on it is known.
"""

import contextlib
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence

from tinsmithd.checkpoint.catalogue import Catalogue
from tinsmithd.checkpoint.store import Blob, Store

SLICE_ROWS = 20
QUICK_ROWS = 2_000
"""Rows that are read without a pause, by whoever waits for it: some hundredths of a second."""
PAUSE = 4.0
"""Pause after a slice, in times of what it took."""


class Collector:
    """Removes unused blobs of a store.

    Args:
        store: The store.
        catalogue: Has all checkpoints of it.
        publishing: Held from a blob's arrival to its first reference.
        opening: Held from a lookup until the blobs are open.
    """

    def __init__(
        self,
        store: Store,
        catalogue: Catalogue,
        publishing: contextlib.AbstractContextManager[object],
        opening: contextlib.AbstractContextManager[object],
    ) -> None:
        self._store, self._catalogue = store, catalogue
        self._publishing, self._opening = publishing, opening
        self._busy = threading.Lock()
        self._stopping = False
        self._suspects: set[str] = set()
        self._everything = True

    @property
    def quick(self) -> bool:
        """Whether it takes a moment."""
        return not self._everything or self._catalogue.rows <= QUICK_ROWS

    def close(self) -> None:
        """Remove nothing any more, from when this returns; the next start looks at all files."""
        self._stopping = True
        with self._busy:
            pass

    def suspect(self, files: Iterable[Blob]) -> None:
        """Some files may not be referred to any more, or never were."""
        self._suspects.update(blob.place for blob in files)

    def collect(self) -> int:
        """Remove what is unused; returns how many blobs. Nothing where another thread does it.

        Raises:
            DataLoss: The catalogue is damaged: nothing is removed on its word.
            ResourceExhausted, Unavailable, OSError: The disk fails.
        """
        if not self._busy.acquire(blocking=False):
            return 0
        try:
            return self._collect()
        finally:
            self._busy.release()

    def _collect(self) -> int:
        dropped = self._catalogue.references.take_dropped()
        # Of a damaged row nobody knows what it had.
        self._everything |= dropped is None
        self._suspects |= {*(dropped or ())}
        everything, suspects = self._everything, set(self._suspects)
        if not (everything or suspects):
            return 0
        with self._publishing:
            self._catalogue.settle()
        if everything and not self._read_references():
            return 0  # it was stopped
        removed = self._store.sweep(
            self._unused, of=None if everything else suspects, guard=self._guarded
        )
        self._suspects -= suspects
        self._everything = False
        return removed

    def _read_references(self) -> bool:
        """Find out what the rows refer to; False where it was stopped."""
        quick = self._catalogue.rows <= QUICK_ROWS
        begun_s = time.thread_time()
        for _ in self._catalogue.references.read(SLICE_ROWS, whole=quick):
            if self._stopping:
                return False
            if not quick:
                time.sleep(PAUSE * (time.thread_time() - begun_s))
                begun_s = time.thread_time()
        return True

    def _unused(self, places: Sequence[str]) -> Collection[str]:
        return [] if self._stopping else self._catalogue.references.unused(places)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        with self._publishing, self._opening:
            yield
