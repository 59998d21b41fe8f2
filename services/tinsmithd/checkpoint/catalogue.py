"""The catalogue: which checkpoints there are, in SQLite, one row each.

A checkpoint appears, changes, is replaced and disappears in one transaction, and a transaction is
on the disk when its method returns. An expired checkpoint is absent at once, whether or not it
was swept. All methods belong to one thread. Methods that drop files return the digests that lost
a reference, so that the caller can remove blobs that nobody needs.
"""

import base64
import binascii
import dataclasses
import hashlib
import json
import sqlite3
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinsmithd.checkpoint.records import (
    CheckpointChange,
    CheckpointPage,
    CheckpointQuery,
    CheckpointRecord,
    FileRecord,
    expire_at,
)
from tinsmithd.checkpoint.store import StorageError, storage_full
from tinsmithd.domain import CheckpointKind, CheckpointPath, LoraConfig
from tinsmithd.errors import (
    AlreadyExists,
    InvalidArgument,
    NotFound,
    Reason,
    Unavailable,
)

SCHEMA_VERSION = 1
PAGE_METADATA_CHARS_MAX = 512 * 1024
"""A page ends early at this much metadata: four bytes a character stay under gRPC's 4 MiB."""
_SCHEMA = """
CREATE TABLE checkpoints (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    model_id TEXT NOT NULL,
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    base_model TEXT NOT NULL,
    lora TEXT NOT NULL,
    step_count INTEGER NOT NULL,
    create_ns INTEGER NOT NULL,
    expire_ns INTEGER,
    user_metadata TEXT NOT NULL,
    public INTEGER NOT NULL,
    UNIQUE (model_id, kind, name)
) STRICT;
CREATE INDEX checkpoints_expire ON checkpoints (expire_ns) WHERE expire_ns IS NOT NULL;
CREATE TABLE files (
    sequence INTEGER NOT NULL REFERENCES checkpoints ON DELETE CASCADE,
    name TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    sha256 BLOB NOT NULL,
    PRIMARY KEY (sequence, name)
) STRICT, WITHOUT ROWID;
CREATE INDEX files_sha256 ON files (sha256);
"""
_TOKEN = struct.Struct(">q8s4s")


class Catalogue:
    """The catalogue in one file; times come from the caller, so a test can choose them.

    Raises:
        StorageError: The file is damaged, of a later version, or cannot be written.
    """

    def __init__(self, file: Path) -> None:
        try:
            self._db = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version not in (0, SCHEMA_VERSION):
                raise StorageError(f"{file}: version {version}, this server reads {SCHEMA_VERSION}")
            if version == 0:
                set_version = f"PRAGMA user_version = {SCHEMA_VERSION};"
                self._db.executescript(f"BEGIN;{_SCHEMA}{set_version}COMMIT;")
            (verdict,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.Error as error:
            raise StorageError(f"{file}: {error}") from error
        if verdict != "ok":
            raise StorageError(f"{file}: {verdict}")

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def get(self, path: CheckpointPath, now_ns: int) -> CheckpointRecord:
        """One checkpoint.

        Raises:
            NotFound: There is none, or it has expired (CHECKPOINT_NOT_FOUND).
        """
        found = self._find(path, now_ns)
        if found is None:
            raise _not_found(path)
        return self._record(found)

    def page(
        self, query: CheckpointQuery, page_size: int, token: str, now_ns: int
    ) -> CheckpointPage:
        """A page of checkpoints without their files, newest first.

        What is added meanwhile does not move later pages. A page may be shorter than asked.

        Raises:
            InvalidArgument: The token is none of this query's.
        """
        where = ["(expire_ns IS NULL OR expire_ns > ?)"]
        values: list[Any] = [now_ns]
        if query.model_id is not None:
            where.append("model_id = ?")
            values.append(query.model_id)
        if query.kind is not None:
            where.append("kind = ?")
            values.append(str(query.kind))
        condition = " AND ".join(where)
        with _database_errors():
            (total,) = self._db.execute(
                f"SELECT count(*) FROM checkpoints WHERE {condition}", values
            ).fetchone()
            rows = self._db.execute(
                f"SELECT * FROM checkpoints WHERE {condition} AND sequence < ?"
                " ORDER BY sequence DESC LIMIT ?",
                [*values, _read_token(token, query), page_size + 1],
            ).fetchall()
        taken: list[sqlite3.Row] = []
        chars = 0
        for row in rows[:page_size]:
            chars += len(row["user_metadata"])
            if taken and chars > PAGE_METADATA_CHARS_MAX:
                break
            taken.append(row)
        more = len(taken) < len(rows)
        next_token = _write_token(taken[-1]["sequence"], query) if more else ""
        return CheckpointPage(tuple(_read_row(r, ()) for r in taken), next_token, total)

    def publish(
        self, record: CheckpointRecord, overwrite: bool, now_ns: int
    ) -> tuple[CheckpointRecord, list[bytes]]:
        """Make a checkpoint visible, whole.

        A name that has the same content keeps its first checkpoint, unless `overwrite` would
        change what is said of it. Other content is replaced only with `overwrite`.

        Returns:
            The checkpoint that the name has now, and the digests that lost a reference.

        Raises:
            AlreadyExists: The name has other content (CHECKPOINT_EXISTS).
        """
        with self._transaction():
            dropped: list[bytes] = []
            found = self._find(record.path, 0)
            if found is not None:
                first = self._record(found)
                if first.expire_ns is None or first.expire_ns > now_ns:
                    if first.same_content(record) and not (overwrite and _differs(first, record)):
                        return first, []
                    if not overwrite:
                        raise _exists(record.path)
                dropped = self._delete([found["sequence"]])
            self._insert(record)
            return record, dropped

    def update(
        self, path: CheckpointPath, change: CheckpointChange, now_ns: int
    ) -> CheckpointRecord:
        """Change what a change names.

        Raises:
            NotFound: As `get`.
        """
        with self._transaction():
            found = self._find(path, now_ns)
            if found is None:
                raise _not_found(path)
            sequence = found["sequence"]
            if change.sets_ttl:
                expire_ns = expire_at(now_ns, change.ttl_seconds)
                self._set(sequence, "expire_ns", expire_ns)
            if change.user_metadata is not None:
                self._set(sequence, "user_metadata", _json(dict(change.user_metadata)))
            if change.public is not None:
                self._set(sequence, "public", int(change.public))
            return self.get(path, now_ns)

    def copy(
        self, source: CheckpointPath, target: CheckpointPath, ttl_seconds: int | None, now_ns: int
    ) -> tuple[CheckpointRecord, list[bytes]]:
        """Give the files of one checkpoint a second name, with a life of its own.

        Returns:
            As `publish`.

        Raises:
            NotFound: There is no source (CHECKPOINT_NOT_FOUND).
            AlreadyExists: The name has other content (CHECKPOINT_EXISTS).
        """
        copied = dataclasses.replace(
            self.get(source, now_ns),
            path=target,
            create_ns=now_ns,
            expire_ns=expire_at(now_ns, ttl_seconds),
            public=False,
        )
        return self.publish(copied, False, now_ns)

    def delete(self, path: CheckpointPath, now_ns: int) -> list[bytes]:
        """Delete a checkpoint.

        Returns:
            The digests that lost a reference.

        Raises:
            NotFound: As `get`.
        """
        with self._transaction():
            found = self._find(path, now_ns)
            if found is None:
                raise _not_found(path)
            return self._delete([found["sequence"]])

    def delete_expired(self, now_ns: int, count_max: int) -> list[bytes]:
        """Delete up to `count_max` expired checkpoints; returns digests as `delete`."""
        with self._transaction():
            rows = self._db.execute(
                "SELECT sequence FROM checkpoints WHERE expire_ns <= ? LIMIT ?", (now_ns, count_max)
            ).fetchall()
            return self._delete([row["sequence"] for row in rows])

    def is_referenced(self, sha256: bytes) -> bool:
        """True when a checkpoint has a file with this content."""
        with _database_errors():
            found = self._db.execute("SELECT 1 FROM files WHERE sha256 = ? LIMIT 1", (sha256,))
            return found.fetchone() is not None

    def digests(self) -> set[bytes]:
        """The digests of all files of all checkpoints."""
        with _database_errors():
            return {row[0] for row in self._db.execute("SELECT DISTINCT sha256 FROM files")}

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with _database_errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                # A failed COMMIT may have ended the transaction by itself.
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _find(self, path: CheckpointPath, now_ns: int) -> sqlite3.Row | None:
        with _database_errors():
            found: sqlite3.Row | None = self._db.execute(
                "SELECT * FROM checkpoints WHERE model_id = ? AND kind = ? AND name = ?"
                " AND (expire_ns IS NULL OR expire_ns > ?)",
                (path.model_id, str(path.kind), path.name, now_ns),
            ).fetchone()
            return found

    def _record(self, row: sqlite3.Row) -> CheckpointRecord:
        with _database_errors():
            files = self._db.execute(
                "SELECT name, size_bytes, sha256 FROM files WHERE sequence = ? ORDER BY name",
                (row["sequence"],),
            ).fetchall()
        return _read_row(row, tuple(FileRecord(*file) for file in files))

    def _insert(self, record: CheckpointRecord) -> None:
        values = {
            "model_id": record.path.model_id,
            "kind": str(record.path.kind),
            "name": record.path.name,
            "base_model": record.base_model,
            "lora": _json(dataclasses.asdict(record.lora)),
            "step_count": record.step_count,
            "create_ns": record.create_ns,
            "expire_ns": record.expire_ns,
            "user_metadata": _json(dict(record.user_metadata)),
            "public": int(record.public),
        }
        marks = ", ".join(f":{key}" for key in values)
        cursor = self._db.execute(
            f"INSERT INTO checkpoints ({', '.join(values)}) VALUES ({marks})", values
        )
        self._db.executemany(
            "INSERT INTO files VALUES (?, ?, ?, ?)",
            [(cursor.lastrowid, f.name, f.size_bytes, f.sha256) for f in record.files],
        )

    def _set(self, sequence: int, column: str, value: object) -> None:
        self._db.execute(
            f"UPDATE checkpoints SET {column} = ? WHERE sequence = ?", (value, sequence)
        )

    def _delete(self, sequences: Sequence[int]) -> list[bytes]:
        dropped: list[bytes] = []
        for sequence in sequences:
            rows = self._db.execute("SELECT sha256 FROM files WHERE sequence = ?", (sequence,))
            dropped.extend(row[0] for row in rows)
            self._db.execute("DELETE FROM checkpoints WHERE sequence = ?", (sequence,))
        return dropped


def _differs(first: CheckpointRecord, record: CheckpointRecord) -> bool:
    # A time to live counts from now, so a new one always differs.
    said = (first.user_metadata, first.public, first.expire_ns)
    return said != (record.user_metadata, record.public, None) or record.expire_ns is not None


def _read_row(row: sqlite3.Row, files: tuple[FileRecord, ...]) -> CheckpointRecord:
    path = CheckpointPath(row["model_id"], CheckpointKind(row["kind"]), row["name"])
    return CheckpointRecord(
        path=path,
        base_model=row["base_model"],
        lora=LoraConfig(**json.loads(row["lora"])),
        step_count=row["step_count"],
        create_ns=row["create_ns"],
        expire_ns=row["expire_ns"],
        user_metadata=json.loads(row["user_metadata"]),
        public=bool(row["public"]),
        files=files,
    )


def _write_token(sequence: int, query: CheckpointQuery) -> str:
    body = struct.pack(">q8s", sequence, _query_digest(query))
    check = hashlib.sha256(body).digest()[:4]
    return base64.urlsafe_b64encode(body + check).decode().rstrip("=")


def _read_token(token: str, query: CheckpointQuery) -> int:
    if not token:
        return (1 << 63) - 1
    try:
        raw = base64.urlsafe_b64decode(token.encode("ascii") + b"=" * (-len(token) % 4))
        sequence, digest, check = _TOKEN.unpack(raw)
    except (UnicodeEncodeError, binascii.Error, ValueError, struct.error):
        raise InvalidArgument("page_token", "is not one that this server made") from None
    if check != hashlib.sha256(raw[:-4]).digest()[:4]:
        raise InvalidArgument("page_token", "is not one that this server made")
    if digest != _query_digest(query):
        raise InvalidArgument("page_token", "belongs to a listing with another filter")
    return int(sequence)


def _query_digest(query: CheckpointQuery) -> bytes:
    return hashlib.sha256(repr((query.model_id, query.kind)).encode()).digest()[:8]


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _not_found(path: CheckpointPath) -> NotFound:
    return NotFound(f"there is no checkpoint {path}", Reason.CHECKPOINT_NOT_FOUND)


def _exists(path: CheckpointPath) -> AlreadyExists:
    message = f"{path} exists with other content; set overwrite to replace it"
    return AlreadyExists(message, Reason.CHECKPOINT_EXISTS)


@contextmanager
def _database_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
            raise storage_full() from error
        message = f"the catalogue cannot be written: {error}"
        raise Unavailable(message, Reason.CHECKPOINT_UNAVAILABLE, retry_after_s=5.0) from error
