"""Small files of a checkpoint on its way in stay in memory until the write ends."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinsmithd.checkpoint.store.directory import DirectoryStore
from tinsmithd.checkpoint.store.interface import Staging
from tinsmithd.checkpoint.store.spool import KEEPERS_MAX, KEPT_BYTES

SMALL, LARGE = "model_state.json", "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def store(folder: Path) -> Iterator[DirectoryStore]:
    opened = DirectoryStore(folder)
    yield opened
    opened.close()


def on_disk(folder: Path) -> list[Path]:
    """Files that are on their way in."""
    return [path for path in (folder / "staging").rglob("*") if path.is_file()]


def blob(folder: Path, content: bytes) -> Path:
    """Where a content is once it is published."""
    digest = hashlib.sha256(content).hexdigest()
    return folder / "blobs" / digest[:2] / digest


def staged(store: DirectoryStore, *contents: bytes) -> Staging:
    """A write that has some files."""
    staging = store.stage(1 << 30)
    for index, content in enumerate(contents):
        staging.append(f"{index}", 0, content)
    return staging


def test_small_files_meet_no_disk_before_the_write_ends(
    store: DirectoryStore, folder: Path
) -> None:
    staging = store.stage(1 << 30)
    assert staging.keeps(SMALL, 2)
    staging.append(SMALL, 0, b"{}")
    staging.flush()
    assert not on_disk(folder)
    assert staging.is_clean
    with staging.open(SMALL) as file:
        assert file.read() == b"{}"
    staging.finish()
    assert len(on_disk(folder)) == 1
    assert not staging.is_clean
    staging.publish()
    assert blob(folder, b"{}").read_bytes() == b"{}"
    assert staging.is_clean
    assert not list((folder / "staging").iterdir())
    staging.discard()


def test_a_file_that_outgrows_memory_goes_on_on_the_disk_alone(
    store: DirectoryStore, folder: Path
) -> None:
    pieces = [bytes([n]) * (KEPT_BYTES // 2) for n in range(1, 4)]
    staging = store.stage(1 << 30)
    staging.append(SMALL, 0, b"{}")
    for index, piece in enumerate(pieces):
        assert staging.keeps(LARGE, len(piece)) == (index == 0)
        staging.append(LARGE, index * len(piece), piece)
    assert len(on_disk(folder)) == 1
    staging.finish()
    staging.publish()
    assert blob(folder, b"".join(pieces)).read_bytes() == b"".join(pieces)
    assert blob(folder, b"{}").read_bytes() == b"{}"
    staging.discard()


def test_what_is_stored_is_not_written_again(store: DirectoryStore, folder: Path) -> None:
    for _ in range(2):
        staging = staged(store, b"the same", b"")
        staging.finish()
        wrote = on_disk(folder)
        staging.publish()
        staging.discard()
    assert not wrote
    assert blob(folder, b"the same").read_bytes() == b"the same"


@pytest.mark.parametrize("damage", ["removed", "damaged"])
def test_what_is_not_stored_any_more_is_written_durably(
    store: DirectoryStore, folder: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep may come between the end of the files and the moment in which they count."""
    first = staged(store, b"the same")
    first.finish()
    first.publish()
    first.discard()
    staging = staged(store, b"the same")
    staging.finish()
    if damage == "removed":
        blob(folder, b"the same").unlink()
    else:
        blob(folder, b"the same").write_bytes(b"another!")
    synced: set[int] = set()
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", noted)
    staging.publish()
    place = blob(folder, b"the same")
    assert place.read_bytes() == b"the same"
    assert {place.stat().st_ino, place.parent.stat().st_ino} <= synced
    staging.discard()


def test_few_writes_keep_files_in_memory_at_a_time(store: DirectoryStore, folder: Path) -> None:
    keepers = [staged(store, b"small") for _ in range(KEEPERS_MAX)]
    other = staged(store, b"small")
    assert not other.keeps(SMALL, 1)
    assert len(on_disk(folder)) == 1
    keepers[0].discard()
    keepers[0].discard()
    assert staged(store, b"small").keeps(SMALL, 1)
    assert not staged(store, b"small").keeps(SMALL, 1)
