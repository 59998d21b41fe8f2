"""What checkpoints exist: one SQLite file, one row per checkpoint, one per file of it.

A checkpoint is visible from the commit of its row on and not before. Calls may come from any
thread. Times are seconds since 1970, from an injected clock.
"""

import json
import sqlite3
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tinsmithd.checkpoint.store import Blob
from tinsmithd.domain import CheckpointKind, CheckpointPath, FullConfig, LoraConfig, Tuning
from tinsmithd.errors import AlreadyExists, NotFound, Reason

SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE checkpoints (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    model_id TEXT NOT NULL,
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    base_model TEXT NOT NULL,
    lora TEXT NOT NULL,
    step_count INTEGER NOT NULL,
    create_time_s REAL NOT NULL,
    expire_time_s REAL,
    user_metadata TEXT NOT NULL,
    public INTEGER NOT NULL,
    UNIQUE (model_id, kind, name)
);
CREATE TABLE files (
    number INTEGER NOT NULL REFERENCES checkpoints ON DELETE CASCADE,
    name TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    PRIMARY KEY (number, name)
);
CREATE INDEX files_by_content ON files (sha256);
CREATE INDEX checkpoints_by_expiry ON checkpoints (expire_time_s);
"""


@dataclass(frozen=True)
class Checkpoint:
    """What is known of a checkpoint; `expire_time_s` None means never."""

    path: CheckpointPath
    base_model: str
    tuning: Tuning
    step_count: int
    create_time_s: float
    expire_time_s: float | None
    user_metadata: Mapping[str, str]
    public: bool
    files: Sequence[Blob]
    number: int = 0
    """Rises with every commit; orders pages."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all its files."""
        return sum(blob.size_bytes for blob in self.files)


class Catalogue:
    """The checkpoints of one folder."""

    def __init__(self, file: Path, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.RLock()
        self._db = sqlite3.connect(file, check_same_thread=False, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            self._db.execute(f"PRAGMA {pragma}")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            self._db.executescript(
                f"BEGIN; {_SCHEMA} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;"
            )
        elif version != SCHEMA_VERSION:
            raise RuntimeError(f"{file} has schema {version}, this server knows {SCHEMA_VERSION}")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def get(self, path: CheckpointPath) -> Checkpoint:
        """One checkpoint.

        Raises:
            NotFound: There is none, or it expired (CHECKPOINT_NOT_FOUND).
        """
        with self._lock:
            found = self._find(path)
            if found is None:
                raise NotFound(f"no checkpoint {path}", Reason.CHECKPOINT_NOT_FOUND)
            return found

    def _find(self, path: CheckpointPath) -> Checkpoint | None:
        row = self._db.execute(
            "SELECT * FROM checkpoints WHERE model_id=? AND kind=? AND name=?"
            " AND (expire_time_s IS NULL OR expire_time_s > ?)",
            (path.model_id, path.kind, path.name, self._clock()),
        ).fetchone()
        return None if row is None else self._read(row)

    def _read(self, row: sqlite3.Row) -> Checkpoint:
        files = self._db.execute(
            "SELECT name, size_bytes, sha256 FROM files WHERE number=? ORDER BY name",
            (row["number"],),
        ).fetchall()
        return Checkpoint(
            path=CheckpointPath(row["model_id"], CheckpointKind(row["kind"]), row["name"]),
            base_model=row["base_model"],
            tuning=_tuning(row["lora"]),
            step_count=row["step_count"],
            create_time_s=row["create_time_s"],
            expire_time_s=row["expire_time_s"],
            user_metadata=json.loads(row["user_metadata"]),
            public=bool(row["public"]),
            files=[Blob(*file) for file in files],
            number=row["number"],
        )

    def add(self, checkpoint: Checkpoint, *, overwrite: bool) -> Checkpoint:
        """Make a checkpoint visible, durably.

        Returns:
            It as it is kept; the one that was there, when that has the same files and nothing
            is to be overwritten: then this is a repeat.

        Raises:
            AlreadyExists: There is one with other files (CHECKPOINT_EXISTS).
        """
        path = checkpoint.path
        with self._lock, self._db:
            self._db.execute("BEGIN IMMEDIATE")
            found = self._find(path)
            if found is not None and not overwrite:
                if list(found.files) == list(checkpoint.files):
                    return found
                message = f"{path} exists; save under another name, or overwrite it"
                raise AlreadyExists(message, Reason.CHECKPOINT_EXISTS)
            self._delete(path)
            cursor = self._db.execute(
                "INSERT INTO checkpoints (model_id, kind, name, base_model, lora, step_count,"
                " create_time_s, expire_time_s, user_metadata, public)"
                " VALUES (?,?,?,?,?,?,?,?,?,?)",
                (
                    *(path.model_id, path.kind, path.name, checkpoint.base_model),
                    *(_json(checkpoint.tuning), checkpoint.step_count),
                    *(checkpoint.create_time_s, checkpoint.expire_time_s),
                    *(json.dumps(dict(checkpoint.user_metadata)), checkpoint.public),
                ),
            )
            number = cursor.lastrowid
            assert number is not None
            self._db.executemany(
                "INSERT INTO files VALUES (?,?,?,?)",
                [(number, blob.name, blob.size_bytes, blob.sha256) for blob in checkpoint.files],
            )
            return replace(checkpoint, number=number)

    def _delete(self, path: CheckpointPath) -> int:
        return self._db.execute(
            "DELETE FROM checkpoints WHERE model_id=? AND kind=? AND name=?",
            (path.model_id, path.kind, path.name),
        ).rowcount

    def delete(self, path: CheckpointPath) -> None:
        """Remove a checkpoint.

        Raises:
            NotFound: There is none (CHECKPOINT_NOT_FOUND).
        """
        with self._lock, self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self.get(path)
            self._delete(path)

    def update(
        self,
        path: CheckpointPath,
        change: Callable[[Checkpoint], Checkpoint],
    ) -> Checkpoint:
        """Change expiry, metadata and the public flag of a checkpoint; returns it as it is now.

        Raises:
            NotFound: There is none (CHECKPOINT_NOT_FOUND).
        """
        with self._lock, self._db:
            self._db.execute("BEGIN IMMEDIATE")
            changed = change(self.get(path))
            self._db.execute(
                "UPDATE checkpoints SET expire_time_s=?, user_metadata=?, public=? WHERE number=?",
                (
                    *(changed.expire_time_s, json.dumps(dict(changed.user_metadata))),
                    *(changed.public, changed.number),
                ),
            )
            return changed

    def page(
        self, *, model_id: str, kind: CheckpointKind | None, before: int | None, size: int
    ) -> tuple[Sequence[Checkpoint], int]:
        """Checkpoints, newest first, and how many match in all.

        Args:
            model_id: Only this model's; empty means all.
            kind: Only this kind; None means all.
            before: Only those with a lower `number`; None begins with the newest.
            size: At most so many.
        """
        where = "(expire_time_s IS NULL OR expire_time_s > ?)"
        values: list[object] = [self._clock()]
        if model_id:
            where, values = where + " AND model_id=?", [*values, model_id]
        if kind is not None:
            where, values = where + " AND kind=?", [*values, kind]
        with self._lock:
            query = f"SELECT count(*) FROM checkpoints WHERE {where}"
            total = self._db.execute(query, values).fetchone()[0]
            if before is not None:
                where, values = where + " AND number<?", [*values, before]
            rows = self._db.execute(
                f"SELECT * FROM checkpoints WHERE {where} ORDER BY number DESC LIMIT ?",
                [*values, size],
            ).fetchall()
            return [self._read(row) for row in rows], total

    def delete_expired(self) -> int:
        """Remove what expired; returns how many."""
        with self._lock, self._db:
            self._db.execute("BEGIN IMMEDIATE")
            query = "DELETE FROM checkpoints WHERE expire_time_s <= ?"
            return self._db.execute(query, (self._clock(),)).rowcount

    def contents(self) -> Collection[str]:
        """SHA-256 of every file that a checkpoint refers to."""
        with self._lock:
            return {row[0] for row in self._db.execute("SELECT DISTINCT sha256 FROM files")}


def _json(tuning: Tuning) -> str:
    """The column `lora`: an adapter's shape, or null where there is no adapter."""
    return json.dumps(None if isinstance(tuning, FullConfig) else asdict(tuning))


def _tuning(column: str) -> Tuning:
    lora = json.loads(column)
    return FullConfig() if lora is None else LoraConfig(**lora)
