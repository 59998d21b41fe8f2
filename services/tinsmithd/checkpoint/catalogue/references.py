"""How many checkpoints have a file: read from the rows once, each checked against its digest, and
kept with each change from then on.

So what a checkpoint that went had is known to be unused at once, whatever else there is. It is kept
in memory, 8 bytes for each file of a checkpoint, and not in SQLite's file, of which a damaged page
could say that nothing refers to a file that is needed.
"""

import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np

from tinsmithd.checkpoint.catalogue import schema, tallies
from tinsmithd.checkpoint.catalogue.record import places_of
from tinsmithd.checkpoint.catalogue.refusals import rows_missing
from tinsmithd.checkpoint.catalogue.rows import Moved, Rows
from tinsmithd.checkpoint.catalogue.transactions import Transactions
from tinsmithd.errors import DataLoss, Reason
from tinsmithd.owners import ANY_OWNER

CHANGES_MAX = 100_000
"""Places that changed, after which rows are read again: those take more memory."""
_PREFIX_DIGITS = 16
_ALL = 2**63


class References:
    """Which files checkpoints have, of a catalogue that this process alone has.

    Args:
        transactions: Those of the catalogue.
    """

    def __init__(self, transactions: Transactions) -> None:
        self._reading, self._db = transactions.reading, transactions.db
        self._settle = transactions.settle
        self._removals = 0
        self._counts = _Counts()
        self._dropped: set[str] | None = None
        transactions.committed.append(self._note)

    def _note(self, rows: Rows) -> None:
        """Take note of what a transaction of this process did, before anything else happens."""
        self._removals += rows.removals
        if not self._counts.change(rows.moved):
            self._forget()
        elif self._dropped is not None:
            for _, before, after in rows.moved:
                self._dropped.update(set(before or ()).difference(after))

    def _forget(self) -> "_Counts":
        self._counts, self._dropped = _Counts(), None
        return self._counts

    def take_dropped(self) -> Collection[str] | None:
        """Places of files that checkpoints had since the last time, and do not have any more.

        None where nobody knows, or what checkpoints have: then `read` comes first.
        """
        with self._reading():
            if not self._counts.is_whole:
                return None
            dropped, self._dropped = self._dropped, set()
            return dropped

    def read(self, size: int, *, whole: bool) -> Iterator[None]:
        """Read which files checkpoints have, of `size` of them at once, with others in between.

        With `whole`, looks first whether the file is, which takes seconds if it is large.

        Raises:
            DataLoss: Something is damaged, so that nobody knows (CHECKPOINT_CORRUPT).
        """
        query = "SELECT * FROM checkpoints WHERE number>? ORDER BY number LIMIT ?"
        with self._reading():
            self._settle()
            if whole:
                self._check_whole()
            expected, _ = tallies.sums(self._db, ANY_OWNER, None)
            removals, last = self._removals, -1
            counts = self._forget()
            self._dropped = set()
        while True:
            with self._reading():
                rows = self._db.execute(query, (last, size)).fetchall()
                for row in rows:
                    last = row["number"]
                    counts.read(last, places_of(row))
                if not rows:
                    counts.end()
                    expected -= self._removals - removals
                    break
            yield
        if counts.rows_read < expected:
            raise rows_missing(counts.rows_read, expected)
        counts.order()

    def _check_whole(self) -> None:
        try:
            schema.check_whole(self._db)
        except ValueError as error:
            message = f"the catalogue of checkpoints is damaged: {error}"
            raise DataLoss(message, Reason.CHECKPOINT_CORRUPT) from error

    def unused(self, places: Sequence[str]) -> Collection[str]:
        """Those of these places that no checkpoint refers to; none before they were read."""
        with self._reading():
            return self._counts.unused(places)


class _Counts:
    """Files of checkpoints by their places, of which the first 64 bits count: so a file that
    nothing refers to may seem to be needed, and never the other way round.

    First `read` gets the rows in order of their numbers, beside `change`; then `end`, while nothing
    changes, and `order`.
    """

    def __init__(self) -> None:
        self.rows_read = 0
        self._read = array.array("Q")
        self._sorted = np.empty(0, np.uint64)
        self._changed: Counter[int] = Counter()
        self._last = -1
        self._is_ordered = False

    @property
    def is_whole(self) -> bool:
        """Whether all rows were read, and it is worth to go on."""
        return self._is_ordered and len(self._changed) < CHANGES_MAX

    def read(self, number: int, places: Iterable[str]) -> None:
        """Take in the next row."""
        self._read.extend(map(_prefix, places))
        self._last = number
        self.rows_read += 1

    def end(self) -> None:
        """All rows were read."""
        self._last = _ALL

    def order(self) -> None:
        """Make it fit to be asked; takes a moment."""
        if self._read:
            self._sorted = np.frombuffer(self._read, np.uint64)
            self._sorted.sort()
        self._is_ordered = True

    def change(self, moved: Iterable[Moved]) -> bool:
        """Take in what a transaction changed; False where nobody knows what it was."""
        for number, before, after in moved:
            if number > self._last:
                continue  # its row is still to be read
            if before is None:
                return False
            self._changed.update(map(_prefix, after))
            self._changed.subtract(map(_prefix, before))
        return True

    def unused(self, places: Sequence[str]) -> Collection[str]:
        """Those of these places that nothing refers to; none before all rows were read."""
        if not self._is_ordered:
            return []
        prefixes = np.array([_prefix(place) for place in places], np.uint64)
        low = np.searchsorted(self._sorted, prefixes, "left")
        high = np.searchsorted(self._sorted, prefixes, "right")
        counts = zip(places, prefixes.tolist(), (high - low).tolist(), strict=True)
        return [place for place, prefix, read in counts if read + self._changed[prefix] <= 0]


def _prefix(place: str) -> int:
    try:
        return int(place[:_PREFIX_DIGITS], 16)
    except ValueError:
        return 0
