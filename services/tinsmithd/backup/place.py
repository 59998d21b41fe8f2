"""A folder with a back-up in it.

    <place>/backup.json                  what is in it, with SHA-256 of each file; written last
    <place>/training/journal.sqlite      one moment of the journal
    <place>/training/snapshots/...       every snapshot that it counts
    <place>/checkpoints/catalogue.sqlite one moment of the catalogue, later than the journal's
    <place>/checkpoints/blobs/...        every file that it names
    <place>/keys.json                    the file of keys

A folder without `backup.json` is none.
"""

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tinsmithd.files import file_digest, sync_file
from tinsmithd.formats import check_known, release

MANIFEST_FILE = "backup.json"
FORMAT = 1
TRAINING, CHECKPOINTS, KEYS = "training", "checkpoints", "keys.json"
COPY_BYTES = 1024 * 1024

Progress = Callable[[int], None]
"""Told of bytes that were copied or read."""


class BackupError(Exception):
    """It cannot be made or used; the message says why."""


@dataclass(frozen=True)
class Entry:
    """A file of a back-up: where it is there, its bytes, and SHA-256 in hex."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class About:
    """What a back-up says of itself.

    Attributes:
        time_s: When it was begun, seconds since 1970.
        release: What made it.
        parts: Which of `TRAINING`, `CHECKPOINTS` and `KEYS` are in it.
        files: All files.
    """

    time_s: float
    release: str
    parts: Sequence[str]
    files: Sequence[Entry]


class NewPlace:
    """A back-up that is being made.

    Args:
        folder: Must not be there yet, or be empty.
        progress: Told of bytes that were copied.

    Raises:
        BackupError: Something is there.
    """

    def __init__(self, folder: Path, progress: Progress = lambda count: None) -> None:
        begin_empty(folder)
        self.folder = folder
        self._progress = progress
        self._time_s = time.time()
        self._entries: dict[str, Entry] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> Sequence[str]:
        """The files that are there."""
        return list(self._entries)

    def path(self, name: str) -> Path:
        """Where a file is, or is to be; its folder is made."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def copy(self, source: Path, name: str) -> Entry:
        """Copy a file.

        Raises:
            FileNotFoundError: It is gone.
        """
        entry = copy_file(source, self.path(name), name, self._progress)
        self._entries[name] = entry
        return entry

    def add(self, name: str) -> None:
        """Take in a file that was written here."""
        with self.path(name).open("rb") as file:
            digest = file_digest(file).hexdigest()
            self._entries[name] = Entry(name, file.tell(), digest)

    def drop(self, name: str) -> None:
        """Remove a file that is not part of it after all."""
        self.path(name).unlink(missing_ok=True)
        self._entries.pop(name, None)

    def finish(self, parts: Sequence[str]) -> About:
        """Make it a back-up."""
        entries = [self._entries[name] for name in sorted(self._entries)]
        about = About(self._time_s, release(), parts, entries)
        text = json.dumps({"format": FORMAT, **asdict(about)}, indent=1)
        sealed = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "backup": text}
        settle()
        write_last(self.folder / MANIFEST_FILE, json.dumps(sealed).encode())
        return about


def begin_empty(folder: Path) -> None:
    """Make a folder, or refuse one that has something in it.

    Raises:
        BackupError: It has.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = sorted(path.name for path in folder.iterdir() if path.name != "lost+found")
    if found:
        raise BackupError(f"{folder} is not empty, it has {found[0]}: name a new folder")


def copy_file(source: Path, place: Path, name: str, progress: Progress) -> Entry:
    """Copy a file, durable with the next `settle`; returns what was copied.

    Raises:
        FileNotFoundError: It is gone.
    """
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as reading, place.open("wb") as writing:
        while piece := reading.read(COPY_BYTES):
            digest.update(piece)
            writing.write(piece)
            size += len(piece)
            progress(len(piece))
    return Entry(name, size, digest.hexdigest())


def write_last(place: Path, data: bytes) -> None:
    """Put a file into its place, whole and durably."""
    part = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    part.write_bytes(data)
    sync_file(part)
    os.replace(part, place)
    sync_file(place.parent)


def remove(folder: Path) -> None:
    """Remove what became no back-up."""
    shutil.rmtree(folder, ignore_errors=True)


def settle() -> None:
    """Make durable all that was written so far: one call, not one for each of a million files."""
    os.sync()


def read_about(folder: Path) -> About:
    """What a back-up says of itself.

    Raises:
        BackupError: It is none, or its list of files is damaged.
        FormatUnknown: A later release made it.
    """
    file = folder / MANIFEST_FILE
    try:
        sealed = json.loads(file.read_bytes())
        text = sealed["backup"]
        if hashlib.sha256(text.encode()).hexdigest() != sealed["sha256"]:
            raise ValueError("its digest differs")
        document = json.loads(text)
        check_known(f"the back-up {folder}", document["format"], FORMAT, document["release"])
        return About(
            document["time_s"],
            document["release"],
            document["parts"],
            [_entry(each) for each in document["files"]],
        )
    except FileNotFoundError as error:
        raise BackupError(f"{folder} is no back-up: it has no {MANIFEST_FILE}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackupError(f"{file} is damaged: {error}") from error


def _entry(values: Mapping[str, Any]) -> Entry:
    entry = Entry(**values)
    path = PurePosixPath(entry.name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"a file {entry.name[:100]!r} leads elsewhere")
    return entry
