"""What is on disk says in which format it is: how that is checked, and brought up to date.

Each kind of file has a number of its own, which rises when an earlier release would misread it. A
format that is newer than this release knows is refused: the process ends with a sentence that says
what to do. An older one is brought up to date by an ordered list of migrations, in one transaction
with whatever begins to use it, so that a process which dies in between leaves the old format.
"""

import contextlib
import importlib.metadata
import json
import logging
import os
import secrets
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinsmithd import failpoints
from tinsmithd.files import sync_file

FOLDER_FILE = "format.json"
"""Name of the file that says in which format a folder is; without one it is format 1."""

_log = logging.getLogger(__name__)


class FormatUnknown(Exception):
    """A later release wrote it; the message says what to do."""


def release() -> str:
    """Version of this release; empty where it runs from a folder."""
    try:
        return importlib.metadata.version("tinsmith")
    except importlib.metadata.PackageNotFoundError:
        return ""


def check_known(what: str, found: int, known: int, written_by: str = "") -> None:
    """Refuse a format of a later release.

    Args:
        what: Names it, for a person.
        found: Its format.
        known: The newest format of this release.
        written_by: The release that wrote it; empty where nobody knows.

    Raises:
        FormatUnknown: It is.
    """
    if found <= known:
        return
    by = f", written by release {written_by}" if written_by else ""
    raise FormatUnknown(
        f"{what} has format {found}{by}; this release, {release() or 'without a version'}, knows "
        f"format {known} and older: start that release or a later one again, or restore the "
        "back-up from before the upgrade (docs/operations.md, Upgrade)"
    )


# --- a file of SQLite ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Migration:
    """One step: `change` makes format `to` of the format before it, in the open transaction."""

    to: int
    change: Callable[[sqlite3.Connection], None]


@dataclass(frozen=True)
class SqliteFormat:
    """The format of a SQLite file; `PRAGMA user_version` has it, and 0 means a new file.

    Attributes:
        what: Names the file, for a person.
        migrations: In order; the last one makes the format of this release.
        read: Reads the format of a file, also of one from before `user_version` had it.
        written_by: Reads the release that wrote a file last; empty where nobody knows.
    """

    what: str
    migrations: Sequence[Migration]
    read: Callable[[sqlite3.Connection], int] = lambda db: int(
        db.execute("PRAGMA user_version").fetchone()[0]
    )
    written_by: Callable[[sqlite3.Connection], str] = lambda db: ""

    @property
    def known(self) -> int:
        """The format of this release."""
        return self.migrations[-1].to

    def look(self, db: sqlite3.Connection, file: Path) -> int:
        """The format of a file, before a transaction begins; of an older one a copy is kept.

        Raises:
            FormatUnknown: A later release wrote it.
            OSError: There is no room for the copy.
        """
        found = self.read(db)
        if found > self.known:
            check_known(f"{self.what} {file}", found, self.known, self.written_by(db))
        if 0 < found < self.known:
            _keep_copy(db, copy_of(file, found))
        return found

    def bring_up(self, db: sqlite3.Connection) -> None:
        """Make the format of this release of an older one, in the transaction that is open.

        A new file has no tables afterwards: its owner makes them.
        """
        found = self.read(db)
        for migration in self.migrations:
            if 0 < found < migration.to:
                migration.change(db)
                failpoints.hit("migrate_mid")
        if found < self.known:
            db.execute(f"PRAGMA user_version={self.known}")
        if 0 < found < self.known:
            _log.warning(
                "%s is brought from format %d to %d; earlier releases cannot use it any more",
                *(self.what, found, self.known),
            )


def copy_of(file: Path, version: int) -> Path:
    """Where a file is kept as it was before it was brought up to date."""
    return file.with_name(f"{file.stem}.format-{version}{file.suffix}")


def _keep_copy(db: sqlite3.Connection, place: Path) -> None:
    part = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    try:
        copy_database(db, part)
        os.replace(part, place)
        sync_file(place.parent)
    except sqlite3.OperationalError as error:
        raise OSError(f"{place} cannot be kept as the way back: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    _log.warning("%s has what was there before; remove it when you do not go back", place)


def copy_database(db: sqlite3.Connection, place: Path) -> None:
    """Copy all of an open file to another place, durably: one moment of it, without its log."""
    with contextlib.closing(sqlite3.connect(place)) as copy:
        db.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE").fetchall()
    sync_file(place)


# --- a folder -----------------------------------------------------------------------------------


def check_folder(folder: Path, what: str, known: int) -> None:
    """Refuse a folder of a later release, and mark it as one of this release.

    Args:
        folder: Its `FOLDER_FILE` is read, and written where it lacks or an earlier release wrote
            it. A disk that takes nothing is no reason not to start.
        what: Names it, for a person.
        known: The format of this release.

    Raises:
        FormatUnknown: A later release wrote it.
        OSError: Nobody can read what the folder is.
    """
    file = folder / FOLDER_FILE
    found, written_by = 0, ""
    with contextlib.suppress(FileNotFoundError):
        try:
            document = json.loads(file.read_bytes())
            found, written_by = int(document["format"]), str(document["release"])
        except (ValueError, KeyError, TypeError) as error:
            raise OSError(f"{file} does not say a format ({type(error).__name__})") from error
    check_known(f"{what} {folder}", found, known, written_by)
    if found == known:
        return
    text = json.dumps({"format": known, "release": release()}) + "\n"
    part = folder / f".{FOLDER_FILE}.{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.write_text(text)
        sync_file(part)
        os.replace(part, file)
    except OSError as error:
        _log.warning("%s is not marked as format %d: %s", folder, known, error.strerror)
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
