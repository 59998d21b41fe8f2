"""How rows of the catalogue change: the one place that writes them, and says what it wrote.

A change says what a row is afterwards, not what was done to it. So changes that are made again, in
the same order, end in the same rows, wherever they begin.

    ["put", number, model_id, kind, name, expire_time_s, record, digest]
    ["remove", number]
    ["writer", name, epoch, digest]
    ["hold", [number, ...]]              somebody uses these ephemeral checkpoints; no row changes
"""

import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from tinsmithd.checkpoint.catalogue import schema, tallies
from tinsmithd.checkpoint.catalogue.record import Checkpoint, text_of
from tinsmithd.domain import CheckpointPath
from tinsmithd.owners import owner_of

Change = Sequence[Any]
"""See the module; what JSON makes of one is one."""


class Moved(NamedTuple):
    """Whose files a row has, before and after a change.

    Attributes:
        number: The row's.
        before: Places of the files that it had; None where it was damaged.
        after: Places of those that it has.
    """

    number: int
    before: Sequence[str] | None
    after: Sequence[str]


class Rows:
    """Writes rows within the transaction that is open.

    Args:
        db: The catalogue's file.
        with_places: Whether the file knows which checkpoints a blob is of, see `view.SCHEMA`.
        repeats: The changes may have been made before, and later ones, too.

    Attributes:
        changes: What was changed, in order.
        removals: How many checkpoints went away.
        moved: Which files rows have, in order.
    """

    def __init__(
        self, db: sqlite3.Connection, *, with_places: bool = False, repeats: bool = False
    ) -> None:
        self.db = db
        self.changes: list[Change] = []
        self.removals = 0
        self.moved: list[Moved] = []
        self._with_places = with_places
        self._repeats = repeats or with_places

    def add(self, checkpoint: Checkpoint) -> Checkpoint:
        """Write a new checkpoint, in place of any that has its path; returns it numbered."""
        self.remove_path(checkpoint.path)
        query = "SELECT seq FROM sqlite_sequence WHERE name='checkpoints'"
        row = self.db.execute(query).fetchone()
        numbered = replace(checkpoint, number=1 if row is None else row["seq"] + 1)
        self.write(numbered)
        return numbered

    def write(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint under its number."""
        path, expire_time_s = checkpoint.path, checkpoint.expire_time_s
        if expire_time_s is not None:
            expire_time_s = float(expire_time_s)  # as SQLite gives it back
        columns = (
            *(checkpoint.number, path.model_id, path.kind, path.name),
            *(expire_time_s, text_of(checkpoint)),
        )
        self.make(("put", *columns, schema.digest_of(*columns)))

    def remove_path(self, path: CheckpointPath) -> None:
        """Remove the checkpoint that has this path, if there is one."""
        query = "SELECT number FROM checkpoints WHERE model_id=? AND kind=? AND name=?"
        row = self.db.execute(query, (path.model_id, path.kind, path.name)).fetchone()
        if row is not None:
            self.remove(row["number"])

    def remove(self, number: int) -> None:
        """Remove one checkpoint, which is there."""
        self.make(("remove", number))
        self.removals += 1

    def write_writer(self, name: str, epoch: int) -> None:
        """Write down the highest epoch of a writer."""
        self.make(("writer", name, epoch, schema.digest_of(name, epoch)))

    def hold(self, numbers: Iterable[int]) -> None:
        """Say that ephemeral checkpoints are in use."""
        self.make(("hold", list(numbers)))

    def make(self, change: Change) -> None:
        """Make a change.

        Raises:
            ValueError: It is none.
        """
        what, *values = change
        if what == "put":
            before = self._uncount(values[0])
            self._give_way(values)
            self.db.execute("INSERT OR REPLACE INTO checkpoints VALUES (?,?,?,?,?,?,?)", values)
            after = tallies.change(self.db, (values[1], values[2], values[5]), 1)
            self.moved.append(Moved(values[0], before, after or ()))
            self._place(values[0], values[5])
        elif what == "remove":
            before = self._uncount(values[0])
            self.moved.append(Moved(values[0], before, ()))
            self.db.execute("DELETE FROM checkpoints WHERE number=?", values)
            self._place(values[0], None)
        elif what == "writer":
            self.db.execute("INSERT OR REPLACE INTO writers VALUES (?,?,?)", values)
        elif what != "hold":
            raise ValueError(f"unknown change {what!r}")
        self.changes.append(change)

    def _give_way(self, columns: Sequence[Any]) -> None:
        """Remove another row that has this one's path: who makes changes again that were made
        before a row came may have a later one."""
        number, *path = columns[:4]
        query = "SELECT number FROM checkpoints WHERE model_id=? AND kind=? AND name=?"
        row = self.db.execute(query, path).fetchone() if self._repeats else None
        if row is not None and row["number"] != number:
            self._uncount(row["number"])
            self.db.execute("DELETE FROM checkpoints WHERE number=?", (row["number"],))
            self._place(row["number"], None)

    def _uncount(self, number: int) -> Sequence[str] | None:
        """A row goes, or is about to be written anew; nothing happens where there is none.

        Returns:
            Places of its files; None where it is damaged.
        """
        query = "SELECT model_id, kind, record FROM checkpoints WHERE number=?"
        row = self.db.execute(query, (number,)).fetchone()
        if row is None:
            return ()
        places = tallies.change(self.db, tuple(row), -1)
        if places is None:
            self.db.execute("DELETE FROM checkpoints WHERE number=?", (number,))
            tallies.count_anew(self.db, owner_of(row["model_id"]))
        return places

    def _place(self, number: int, record: str | None) -> None:
        """Note which blobs a checkpoint has."""
        if not self._with_places:
            return
        self.db.execute("DELETE FROM places WHERE number=?", (number,))
        files = [] if record is None else json.loads(record)["files"]
        self.db.executemany(
            "INSERT OR REPLACE INTO places VALUES (?,?)", [(file[-1], number) for file in files]
        )


def insert(db: sqlite3.Connection, changes: Sequence[Change]) -> None:
    """Write the rows of a snapshot, which are counted afterwards.

    Raises:
        ValueError: They are not those of one.
    """
    puts = [change[1:] for change in changes if change[0] == "put"]
    writers = [change[1:] for change in changes if change[0] == "writer"]
    if len(puts) + len(writers) != len(changes):
        raise ValueError("there is more than rows in it")
    db.executemany("INSERT OR REPLACE INTO writers VALUES (?,?,?)", writers)
    db.executemany("INSERT OR REPLACE INTO checkpoints VALUES (?,?,?,?,?,?,?)", puts)
    places = [(file[-1], put[0]) for put in puts for file in json.loads(put[5])["files"]]
    db.executemany("INSERT OR REPLACE INTO places VALUES (?,?)", places)
