"""The catalogue's file without its server: for back-ups.

The server holds the file's lock for as long as it runs, so SQLite lets nobody else read it. It
appends what it commits to the log (`-wal`), and changes the file only with what the log has; then
it begins the log anew. So a copy of the file, and a log that went on meanwhile and was not begun
anew, are one moment: pages that were being written are in that log, too.
"""

import contextlib
import json
import shutil
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path

from tinsmithd import formats
from tinsmithd.checkpoint.catalogue import schema, wal
from tinsmithd.files import sync_file

COPIES_MAX = 100
PAUSE_S = 0.05
"""Between two tries to copy a catalogue that is written to; the first pause."""
PAUSE_S_MAX = 1.0


class CatalogueBusy(Exception):
    """It was written to whenever somebody tried to copy it."""


def copy_catalogue(file: Path, place: Path) -> None:
    """Copy a catalogue as it is at one moment, also while a server writes to it.

    Raises:
        CatalogueBusy: It changed with every try.
        FormatUnknown: A later release wrote it.
        OSError, sqlite3.Error: Nobody can read it.
    """
    log, copied_log = (Path(f"{each}-wal") for each in (file, place))
    pause_s, error = PAUSE_S, ""
    for _ in range(COPIES_MAX):
        before = wal.since_begun(_content(log))
        shutil.copyfile(file, place)
        after = wal.since_begun(_content(log))
        if after == before or (before and after.startswith(before)):
            copied_log.write_bytes(after)
            try:
                _settle(place)
            except (sqlite3.DatabaseError, ValueError) as damaged:
                error = str(damaged)
            else:
                return
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, PAUSE_S_MAX)
    raise CatalogueBusy(f"{file} {error or 'changed whenever it was copied'}; try again later")


def _content(log: Path) -> bytes:
    try:
        return log.read_bytes()
    except FileNotFoundError:
        return b""


def _settle(place: Path) -> None:
    """Bring what the log has into the copy, which is one file from then on."""
    with contextlib.closing(sqlite3.connect(place, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode=DELETE").fetchall()
        formats.check_known("the catalogue", schema.CATALOGUE.read(db), schema.CATALOGUE.known)
        schema.check_whole(db)
    sync_file(place)


def blobs_in(file: Path) -> tuple[Mapping[str, int], int]:
    """What a copied catalogue refers to.

    Returns:
        Bytes of each file of a checkpoint, by its SHA-256; and how many rows are damaged.

    Raises:
        sqlite3.Error: It cannot be read.
    """
    found: dict[str, int] = {}
    damaged = 0
    with contextlib.closing(sqlite3.connect(file)) as db:
        for row in db.execute("SELECT * FROM checkpoints"):
            try:
                *columns, digest = row
                if schema.digest_of(*columns) != digest:
                    raise ValueError("the digest differs")
                record = json.loads(columns[-1])
                found |= {sha256: size_bytes for _, size_bytes, sha256 in record["files"]}
            except (ValueError, TypeError, KeyError):
                damaged += 1
    return found, damaged
