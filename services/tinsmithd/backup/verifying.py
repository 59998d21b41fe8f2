"""Reads a back-up whole and says what is wrong with it."""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tinsmithd.backup.place import (
    CHECKPOINTS,
    TRAINING,
    About,
    BackupError,
    Progress,
    read_about,
)
from tinsmithd.checkpoint.catalogue import blobs_in
from tinsmithd.checkpoint.opening import CATALOGUE_FILE
from tinsmithd.files import BLOBS_FOLDER, SNAPSHOTS_FOLDER, blob_file, file_digest
from tinsmithd.training.journal import JOURNAL_FILE, problems_in, snapshots_in
from tinsmithd.training.models import MANIFEST_FILE


@dataclass(frozen=True)
class Verified:
    """A back-up that was read.

    Attributes:
        about: What it says of itself.
        problems: What is wrong with it, for a person; empty where it is as it was made, and whole.
    """

    about: About
    problems: Sequence[str]


def verify(folder: Path, progress: Progress = lambda count: None) -> Verified:
    """Read every byte of a back-up, and hold what refers to each other against each other.

    Args:
        folder: Where it is.
        progress: Told of bytes that were read.

    Raises:
        BackupError: It is no back-up.
        FormatUnknown: A later release made it.
    """
    about = read_about(folder)
    found: list[str] = []
    for entry in about.files:
        try:
            with (folder / entry.name).open("rb") as file:
                if file_digest(file).hexdigest() != entry.sha256:
                    found.append(f"{entry.name} is not what was written")
        except OSError as error:
            found.append(f"{entry.name}: {error.strerror}")
        progress(entry.size_bytes)
    if not found:
        names = {entry.name for entry in about.files}
        try:
            found += _loose_ends(folder, about, names)
        except (sqlite3.Error, ValueError) as error:
            raise BackupError(f"{folder} cannot be used: {error}") from error
    return Verified(about, found)


def _loose_ends(folder: Path, about: About, names: set[str]) -> Sequence[str]:
    """What journal and catalogue name and is not there."""
    found: list[str] = []
    if TRAINING in about.parts:
        journal = folder / TRAINING / JOURNAL_FILE
        found += problems_in(journal)
        for snapshots in snapshots_in(journal).values():
            for snapshot in snapshots:
                if f"{TRAINING}/{SNAPSHOTS_FOLDER}/{snapshot.folder}/{MANIFEST_FILE}" not in names:
                    found.append(f"snapshot {snapshot.folder} is not there")
    if CHECKPOINTS in about.parts:
        blobs, damaged = blobs_in(folder / CHECKPOINTS / CATALOGUE_FILE)
        if damaged:
            found.append(f"{damaged} entries of the catalogue are damaged")
        for sha256 in blobs:
            if str(blob_file(Path(CHECKPOINTS, BLOBS_FOLDER), sha256)) not in names:
                found.append(f"a file of a checkpoint is not there: {sha256}")
    return found
