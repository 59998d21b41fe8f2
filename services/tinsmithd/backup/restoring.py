"""Puts a back-up into the empty folders of a new machine.

What came after the back-up is gone. So that no client goes on as if it were not, the restored
journal begins a new incarnation: see `training.call.numbers`.
"""

import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinsmithd.backup.place import (
    CHECKPOINTS,
    KEYS,
    TRAINING,
    BackupError,
    Entry,
    Progress,
    begin_empty,
    copy_file,
    read_about,
    settle,
)
from tinsmithd.checkpoint.opening import CATALOGUE_FILE
from tinsmithd.files import sync_file
from tinsmithd.training.journal import JOURNAL_FILE, begin_incarnation, snapshots_in

LAST = (JOURNAL_FILE, CATALOGUE_FILE)
"""Files that make a folder one that a server starts on: they are put into place last."""


@dataclass(frozen=True)
class Restored:
    """What was restored.

    Attributes:
        time_s: From when it is, seconds since 1970.
        release: What made the back-up.
        models: How many models there are.
        size_bytes: Bytes of all files.
    """

    time_s: float
    release: str
    models: int
    size_bytes: int


def restore(
    folder: Path,
    *,
    training: Path | None = None,
    checkpoints: Path | None = None,
    keys: Path | None = None,
    progress: Progress = lambda count: None,
) -> Restored:
    """Restore a back-up, or parts of it; every file is checked as it is copied.

    Args:
        folder: Where it is.
        training: `data_folder` of the Training server; new or empty. None leaves it out.
        checkpoints: `data_folder` of the Checkpoint server, likewise.
        keys: Where the file of keys is to be; must not be there.
        progress: Told of bytes that were copied.

    Raises:
        BackupError: It cannot be used, or something is in the way. Empty the folders before the
            next try.
        FormatUnknown: A later release made it.
    """
    about = read_about(folder)
    targets = {
        part: target
        for part, target in ((TRAINING, training), (CHECKPOINTS, checkpoints), (KEYS, keys))
        if target is not None
    }
    if not targets:
        raise BackupError("name a folder or a file of keys to restore into")
    for part, target in targets.items():
        if part not in about.parts:
            raise BackupError(f"{folder} has no {part}: it has {', '.join(about.parts)}")
        if part != KEYS:
            begin_empty(target)
        elif target.exists():
            raise BackupError(f"{target} is there already")
    try:
        size_bytes = _copy(folder, targets, about.files, progress)
        models = 0
        if training is not None:
            part_file = training / f".{JOURNAL_FILE}.part"
            begin_incarnation(part_file, time.time() - about.time_s)
            models = len(snapshots_in(part_file))
        for target in targets.values():
            for name in LAST:
                part_file = target / f".{name}.part"
                if part_file.exists():
                    part_file.rename(target / name)
                    sync_file(target)
    except (OSError, sqlite3.Error, ValueError) as error:
        raise BackupError(f"the back-up is not restored: {error}") from error
    return Restored(about.time_s, about.release, models, size_bytes)


def _copy(
    folder: Path, targets: Mapping[str, Path], files: Sequence[Entry], progress: Progress
) -> int:
    """Copy the files of some parts; returns their bytes."""
    size_bytes = 0
    for entry in files:
        part, _, rest = entry.name.partition("/")
        if part not in targets:
            continue
        place = targets[part] / rest if rest else targets[part]
        if rest in LAST:
            place = targets[part] / f".{rest}.part"
        place.parent.mkdir(parents=True, exist_ok=True)
        copied = copy_file(folder / entry.name, place, entry.name, progress)
        if copied != entry:
            raise BackupError(f"{folder / entry.name} is not what was written")
        size_bytes += entry.size_bytes
    settle()
    return size_bytes
