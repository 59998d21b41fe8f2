"""What is synced before a checkpoint counts: all of an ordinary one, nothing of an ephemeral one
until an ordinary one shares its bytes."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoints import TimedKeeper, blobs, files, keep, kept
from tinsmithd.checkpoint.catalogue import transactions
from tinsmithd.checkpoint.catalogue.redo import REDO_BYTES
from tinsmithd.checkpoint.opening import CATALOGUE_FILE
from tinsmithd.domain import CheckpointPath

EPHEMERAL = "tinsmith://run/sampler_weights/ephemeral-0000000000000001"
NAMED = "tinsmith://run/sampler_weights/best"


class Synced(set[int]):
    """Inodes of files and folders that were synced through Python."""

    def has_all_of(self, folder: Path) -> bool:
        """Whether every blob and the names of all of them are durable."""
        paths = {*blobs(folder), *(blob.parent for blob in blobs(folder)), folder / "blobs"}
        return {path.stat().st_ino for path in paths} <= self


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> Synced:
    found = Synced()
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        fsync(descriptor)
        found.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", watched)
    return found


@pytest.fixture
def redo(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What of the catalogue's redo was on the disk, from one wait for it to the next."""
    found = [b""]
    fdatasync = os.fdatasync

    def watched(descriptor: int) -> None:
        fdatasync(descriptor)
        found.append(os.pread(descriptor, REDO_BYTES, 0))

    monkeypatch.setattr(os, "fdatasync", watched)
    return found


@pytest.fixture
def timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TimedKeeper]:
    monkeypatch.setattr(transactions, "SETTLE_S", 3600.0)
    with TimedKeeper.opened(tmp_path / "data") as timed:
        yield timed


def after_a_loss_of_power(timed: TimedKeeper, folder: Path, redo: list[bytes]) -> list[str]:
    """Paths that a catalogue knows whose log is lost: it is never needed for what was synced."""
    folder.mkdir()
    shutil.copytree(timed.folder / "blobs", folder / "blobs")
    shutil.copy(timed.folder / CATALOGUE_FILE, folder / CATALOGUE_FILE)
    (folder / CATALOGUE_FILE).with_suffix(".redo").write_bytes(redo[-1])
    found = TimedKeeper(folder)
    checkpoints, _ = found.keeper.catalogue.page(model_id="", kind=None, before=None, size=10)
    found.keeper.close()
    return [str(checkpoint.path) for checkpoint in checkpoints]


def test_an_ephemeral_checkpoint_waits_for_no_disk(
    timed: TimedKeeper, synced: Synced, redo: list[bytes], tmp_path: Path
) -> None:
    """It outlives the process; the next one that is named makes what is known of it durable."""
    content = files(1, optimizer=False)
    synced.clear()
    keep(timed.keeper, content, EPHEMERAL, ephemeral=True)
    assert not synced
    assert after_a_loss_of_power(timed, tmp_path / "lost", redo) == []
    timed.restart()
    assert kept(timed.keeper, EPHEMERAL) == content
    keep(timed.keeper, files(2, optimizer=False), NAMED)
    assert after_a_loss_of_power(timed, tmp_path / "kept", redo) == [NAMED, EPHEMERAL]


def test_a_named_checkpoint_is_synced_also_where_an_ephemeral_one_has_the_bytes(
    timed: TimedKeeper, synced: Synced
) -> None:
    content = files(1, optimizer=False)
    keep(timed.keeper, content, EPHEMERAL, ephemeral=True)
    synced.clear()
    keep(timed.keeper, content, NAMED)
    assert synced.has_all_of(timed.folder)


@pytest.mark.parametrize("how", ["copied", "given a life of its own"])
def test_an_ephemeral_checkpoint_that_becomes_ordinary_is_synced_first(
    timed: TimedKeeper, synced: Synced, how: str
) -> None:
    keep(timed.keeper, files(1, optimizer=False), EPHEMERAL, ephemeral=True)
    path = CheckpointPath.parse(EPHEMERAL)
    synced.clear()
    if how == "copied":
        timed.keeper.copy(path, CheckpointPath.parse(NAMED), None)
    else:
        timed.keeper.update(path, lambda found: timed.keeper.set_ttl(found, None))
    assert synced.has_all_of(timed.folder)
