"""Takes a back-up while the cluster runs.

The journal goes first, and the catalogue after it: whatever the journal says of a checkpoint is
true of the copied checkpoints, unless somebody deleted it in between. Both are copied as they were
at one moment, and then the files that they name. A file that went meanwhile, because a newer
snapshot replaced it or somebody deleted a checkpoint, makes another round: journal or catalogue
are copied anew, and of the files those that are not there yet.
"""

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tinsmithd.backup import place
from tinsmithd.backup.place import (
    CHECKPOINTS,
    KEYS,
    TRAINING,
    BackupError,
    NewPlace,
    Progress,
)
from tinsmithd.checkpoint.catalogue import CatalogueBusy, blobs_in, copy_catalogue
from tinsmithd.checkpoint.opening import CATALOGUE_FILE
from tinsmithd.files import BLOBS_FOLDER, SNAPSHOTS_FOLDER, blob_file
from tinsmithd.formats import FOLDER_FILE
from tinsmithd.training.journal import (
    JOURNAL_FILE,
    StoredSnapshot,
    copy_journal,
    forget_snapshot,
    snapshots_in,
)
from tinsmithd.training.models import MANIFEST_FILE

ROUNDS_MAX = 50


@dataclass
class Made:
    """What was put into a back-up.

    Attributes:
        models, snapshots, checkpoint_files: How many there are.
        size_bytes: Bytes of all files.
        problems: What is damaged in it as it was at the source, for a person.
    """

    models: int = 0
    snapshots: int = 0
    checkpoint_files: int = 0
    size_bytes: int = 0
    problems: list[str] = field(default_factory=list)


def create(
    folder: Path,
    *,
    training: Path | None = None,
    checkpoints: Path | None = None,
    keys: Path | None = None,
    progress: Progress = lambda count: None,
) -> Made:
    """Take a back-up.

    Args:
        folder: Where it is to be; new or empty.
        training: `data_folder` of the Training server.
        checkpoints: `data_folder` of the Checkpoint server. Where it has another machine, make a
            back-up of its own there, after that of the Training server.
        keys: The file of keys.
        progress: Told of bytes that were copied.

    Raises:
        BackupError: It cannot be made; what was begun is removed.
        FormatUnknown: A later release has these folders.
    """
    parts = [
        name
        for name, given in ((TRAINING, training), (CHECKPOINTS, checkpoints), (KEYS, keys))
        if given is not None
    ]
    if not parts:
        raise BackupError("name a folder or a file of keys to be backed up")
    new, made = NewPlace(folder, progress), Made()
    try:
        if keys is not None:
            new.copy(keys, KEYS)
        if training is not None:
            _take_training(training, new, made)
        if checkpoints is not None:
            _take_checkpoints(checkpoints, new, made)
        about = new.finish(parts)
    except (OSError, sqlite3.Error, ValueError, CatalogueBusy) as error:
        place.remove(folder)
        raise BackupError(f"the back-up is not made: {error}") from error
    except BaseException:
        place.remove(folder)
        raise
    made.size_bytes = sum(entry.size_bytes for entry in about.files)
    return made


# --- journal and snapshots ----------------------------------------------------------------------


def _take_training(source: Path, new: NewPlace, made: Made) -> None:
    journal = f"{TRAINING}/{JOURNAL_FILE}"
    _check_has(source, JOURNAL_FILE, "Training")
    lost: set[str] = set()
    for _ in range(ROUNDS_MAX):
        copy_journal(source / JOURNAL_FILE, new.path(journal))
        models = snapshots_in(new.path(journal))
        gone = _copy_snapshots(source / SNAPSHOTS_FOLDER, models, new, made)
        newest = {found[-1].folder for found in models.values() if found} & gone
        if newest <= lost:  # no server has replaced them: they were lost before
            break
        lost = newest
    else:
        raise BackupError("snapshots were replaced before they could be copied, again and again")
    made.problems += [f"snapshot {folder} is not at its source" for folder in sorted(lost & gone)]
    kept = set()
    for model_id, found in models.items():
        for snapshot in found:
            if snapshot.folder in gone and snapshot != found[-1]:
                forget_snapshot(new.path(journal), model_id, snapshot)  # there is a newer one
            else:
                kept.add(snapshot.folder)
    new.add(journal)
    _copy_if_there(
        source / SNAPSHOTS_FOLDER / FOLDER_FILE, new, f"{TRAINING}/{SNAPSHOTS_FOLDER}/{FOLDER_FILE}"
    )
    for name in new.names():
        folder, _, file = name.removeprefix(f"{TRAINING}/{SNAPSHOTS_FOLDER}/").partition("/")
        if name.startswith(f"{TRAINING}/{SNAPSHOTS_FOLDER}/") and file and folder not in kept:
            new.drop(name)
    made.models, made.snapshots = len(models), len(kept - gone)


def _copy_snapshots(
    source: Path, models: Mapping[str, Sequence[StoredSnapshot]], new: NewPlace, made: Made
) -> set[str]:
    """Copy those that are not there yet; returns those that are gone."""
    gone = set()
    for found in models.values():
        for snapshot in found:
            under = f"{TRAINING}/{SNAPSHOTS_FOLDER}/{snapshot.folder}"
            if f"{under}/{MANIFEST_FILE}" in new:
                continue
            try:
                _copy_snapshot(source / snapshot.folder, under, new, made)
            except FileNotFoundError:
                gone.add(snapshot.folder)
    return gone


def _copy_snapshot(source: Path, under: str, new: NewPlace, made: Made) -> None:
    digests = {}
    try:
        # Its own list, not that of the folder: a server may be removing it.
        manifest = json.loads(json.loads((source / MANIFEST_FILE).read_bytes())["manifest"])
        digests = {each["name"]: each["sha256"] for each in manifest["files"]}
    except (ValueError, KeyError, TypeError):
        made.problems.append(f"snapshot {source.name} is damaged at its source")
    for name, sha256 in digests.items():
        if new.copy(source / name, f"{under}/{name}").sha256 != sha256:
            made.problems.append(f"snapshot {source.name} is damaged at its source: {name}")
    new.copy(source / MANIFEST_FILE, f"{under}/{MANIFEST_FILE}")


def _check_has(source: Path, file: str, server: str) -> None:
    if not (source / file).is_file():
        raise BackupError(f"{source} has no {file}: it is no data_folder of a {server} server")


def _copy_if_there(source: Path, new: NewPlace, name: str) -> None:
    if source.exists():
        new.copy(source, name)


# --- catalogue and blobs ------------------------------------------------------------------------


def _take_checkpoints(source: Path, new: NewPlace, made: Made) -> None:
    catalogue = f"{CHECKPOINTS}/{CATALOGUE_FILE}"
    _check_has(source, CATALOGUE_FILE, "Checkpoint")
    lost: set[str] = set()
    for _ in range(ROUNDS_MAX):
        copy_catalogue(source / CATALOGUE_FILE, new.path(catalogue))
        blobs, damaged = blobs_in(new.path(catalogue))
        gone = _copy_blobs(source / BLOBS_FOLDER, blobs, new, made)
        if gone <= lost:  # nobody has removed their checkpoints: they were lost before
            break
        lost = gone
    else:
        raise BackupError("checkpoints were removed before they could be copied, again and again")
    new.add(catalogue)
    _copy_if_there(source / FOLDER_FILE, new, f"{CHECKPOINTS}/{FOLDER_FILE}")
    for name in new.names():
        if name.startswith(f"{CHECKPOINTS}/{BLOBS_FOLDER}/") and Path(name).name not in blobs:
            new.drop(name)
    if damaged:
        made.problems.append(f"{damaged} entries of the catalogue are damaged")
    made.problems += [f"a file of a checkpoint is not at its source: {each}" for each in gone]
    made.checkpoint_files = len(blobs) - len(gone)


def _copy_blobs(source: Path, blobs: Mapping[str, int], new: NewPlace, made: Made) -> set[str]:
    """Copy those that are not there yet; returns those that are gone."""
    gone = set()
    for sha256 in blobs:
        name = str(blob_file(Path(CHECKPOINTS, BLOBS_FOLDER), sha256))
        if name in new:
            continue
        try:
            if new.copy(blob_file(source, sha256), name).sha256 != sha256:
                made.problems.append(f"a file of a checkpoint is damaged at its source: {sha256}")
        except FileNotFoundError:
            gone.add(sha256)
    return gone
