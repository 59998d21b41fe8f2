"""Snapshots on disk: whole and verified, or damage."""

import random
from pathlib import Path

import pytest

from tinsmithd.errors import DataLoss
from tinsmithd.training.journal import StoreDamaged
from tinsmithd.training.models.snapshot_store import (
    MANIFEST_FILE,
    PIECE_BYTES,
    DiskSnapshotStore,
    check_snapshots,
)

FILES = {
    "weights": random.Random(1).randbytes(PIECE_BYTES + 9),
    "config.json": b"config",
    "empty": b"",
}


async def written(snapshots: DiskSnapshotStore, position: int = 7) -> str:
    """A snapshot of `FILES`, in pieces."""
    draft = snapshots.begin("a", position)
    for name, data in FILES.items():
        await draft.write(name, data[:5])
        await draft.write(name, data[5:])
    folder = await draft.finish(optimizer=True, step_count=3)
    await draft.discard()
    return folder


async def test_files_that_were_left_are_a_snapshot_as_if_they_were_written(tmp_path: Path) -> None:
    """Unless they are not all there, or not as long as was said: then there is none."""
    snapshots = DiskSnapshotStore(tmp_path)
    wanted = (await snapshots.read(await written(snapshots))).pieces
    said = {name: len(data) for name, data in FILES.items()}
    for cut in (0, 1, None):
        draft = snapshots.begin("a", 8)
        folder = Path(await draft.deposit())
        assert folder.is_absolute()
        for name, data in FILES.items():
            if cut is None and name == "weights":
                continue
            (folder / name).write_bytes(data[cut:] if name == "weights" else data)
        draft.left(said)
        if cut == 0:
            found = await snapshots.read(await draft.finish(optimizer=True, step_count=3))
            assert sorted(found.pieces) == sorted(wanted)
        else:
            with pytest.raises(OSError, match="weights"):
                await draft.finish(optimizer=True, step_count=3)
        await draft.discard()
        assert list((tmp_path / "staging").iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "", ".", "..", ".hidden", "x" * 129])
async def test_no_name_leads_out_of_a_snapshots_folder(tmp_path: Path, name: str) -> None:
    """Whoever gave it: nothing is written, and the draft can be discarded."""
    draft = DiskSnapshotStore(tmp_path / "snapshots").begin("a", 1)
    with pytest.raises(DataLoss, match="no name of a state's file"):
        await draft.write(name, b"x")
    await draft.discard()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


async def expect_damage(snapshots: DiskSnapshotStore, folder: str) -> None:
    for read in (snapshots.read, snapshots.verify):
        with pytest.raises(StoreDamaged):
            await read(folder)


@pytest.mark.parametrize("name", [*FILES, MANIFEST_FILE])
async def test_a_snapshot_is_whole_or_damaged(tmp_path: Path, name: str) -> None:
    """It is read to the bit; flipped bits, cut, longer and missing files are always damage."""
    snapshots = DiskSnapshotStore(tmp_path)
    folder = await written(snapshots)
    found = await snapshots.read(folder)
    files = {each: b"".join(data for of, data in found.pieces if of == each) for each in FILES}
    assert (files, found.optimizer, found.step_count) == (FILES, True, 3)
    assert {of for of, _ in found.pieces} == FILES.keys()
    file = tmp_path / folder / name
    data, rng = file.read_bytes(), random.Random(name)
    damaged = [data + b"\1"]
    for at in rng.sample(range(len(data)), min(len(data), 40 if len(data) < 10_000 else 4)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << rng.randrange(8)
        damaged += [bytes(flipped), data[:at]]
    for content in damaged:
        file.write_bytes(content)
        await expect_damage(snapshots, folder)
    file.unlink()
    await expect_damage(snapshots, folder)
    await expect_damage(snapshots, "unknown")
    file.write_bytes(data)
    await snapshots.verify(folder)


async def test_a_discarded_draft_leaves_nothing(tmp_path: Path) -> None:
    """Neither before the first byte nor in the middle; after `finish` it removes nothing."""
    snapshots = DiskSnapshotStore(tmp_path)
    await snapshots.begin("a", 1).discard()
    draft = snapshots.begin("a", 1)
    await draft.write("weights", b"half")
    await draft.discard()
    assert not [*tmp_path.rglob("*.*"), *tmp_path.rglob("weights")]
    folder = await written(snapshots)
    assert {found.name for found in tmp_path.iterdir()} == {"staging", folder}
    assert not [*(tmp_path / "staging").iterdir()]
    await snapshots.verify(folder)


async def test_only_what_is_named_stays_and_what_a_later_process_made(tmp_path: Path) -> None:
    """Sweeping takes drafts, too, and spares all of a higher epoch, drafts as well."""
    snapshots, later = DiskSnapshotStore(tmp_path), DiskSnapshotStore(tmp_path)
    snapshots.epoch, later.epoch = 9, 10
    kept, swept, newer = [await written(each) for each in (snapshots, snapshots, later)]
    drafts = [each.begin("a", 8) for each in (snapshots, later)]
    for draft in drafts:
        await draft.write("weights", b"half")
    (tmp_path / "stray").mkdir()
    check_snapshots(tmp_path)
    await snapshots.keep_only([kept])
    assert {found.name for found in tmp_path.iterdir()} == {"staging", "format.json", kept, newer}
    assert len([*(tmp_path / "staging").iterdir()]) == 1
    last = await drafts[1].finish(optimizer=False, step_count=4)
    for folder in (kept, newer, last):
        await snapshots.verify(folder)
    await snapshots.remove(kept)
    await snapshots.remove(swept)
    await later.keep_only([])
    assert {found.name for found in tmp_path.iterdir()} == {"staging", "format.json"}
    assert not [*(tmp_path / "staging").iterdir()]
