"""Back-ups of folders that change while they are copied, or in which something is lost."""

import contextlib
import itertools
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoints import PATH, blobs, files, keep
from releases import recorded
from tinsmithd import backup
from tinsmithd.backup import creating
from tinsmithd.checkpoint.catalogue import (
    EPOCH_STEP_MAX,
    CatalogueBusy,
    copy_catalogue,
    offline,
    transactions,
)
from tinsmithd.checkpoint.opening import open_keeper
from tinsmithd.checkpoint.rules import Keeper
from tinsmithd.training.journal import SqliteStore, begin_incarnation, snapshots_in
from tinsmithd.training.journal.records import AddSnapshot, Trim

After = Callable[[], None]


@pytest.fixture
async def training(tmp_path: Path) -> Path:
    """The data folder of a Training server, in today's formats."""
    recorded.unpack("0.1.0", tmp_path)
    folder = tmp_path / "data" / "training"
    store = SqliteStore(folder, sync=False)
    await store.claim()
    await store.close()
    return folder


@pytest.fixture
def keeper(tmp_path: Path) -> Keeper:
    """The checkpoints of a running server: two."""
    made = open_keeper(tmp_path / "checkpoints", checkpoint_bytes_max=1 << 30)
    keep(made, files(0))
    keep(made, files(1), f"{PATH}-other")
    return made


def after_first(monkeypatch: pytest.MonkeyPatch, name: str, act: After) -> list[None]:
    """Let something happen right after the first copy of a journal or a catalogue."""
    copy = getattr(creating, name)
    copies: list[None] = []

    def copied(source: Path, place: Path) -> None:
        copy(source, place)
        copies.append(None)
        if len(copies) == 1:
            act()

    monkeypatch.setattr(creating, name, copied)
    return copies


async def replace_snapshot(folder: Path, model_id: str) -> str:
    """What a server does that takes two snapshots of a model; returns the last one's folder."""
    newest = snapshots_in(folder / "journal.sqlite")[model_id][-1]
    store = SqliteStore(folder, sync=False)
    await store.claim()
    name = f"{newest.folder}-later"
    shutil.copytree(folder / "snapshots" / newest.folder, folder / "snapshots" / name)
    position = newest.position + 1
    await store.commit(
        [AddSnapshot(model_id, position, newest.step_count, name), Trim(model_id, position)]
    )
    await store.close()
    shutil.rmtree(folder / "snapshots" / newest.folder)
    return name


async def test_a_snapshot_that_is_replaced_meanwhile_makes_another_round(
    training: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copied journal counts what the back-up has, and nothing else is in it."""
    models = snapshots_in(training / "journal.sqlite")
    model_id = next(model_id for model_id, found in models.items() if found)
    names: list[str] = []
    replaced = shutil.copytree(training, tmp_path / "later")
    names.append(await replace_snapshot(Path(replaced), model_id))

    def replace() -> None:
        shutil.rmtree(training)
        shutil.copytree(tmp_path / "later", training)

    copies = after_first(monkeypatch, "copy_journal", replace)
    made = backup.create(tmp_path / "made", training=training)
    assert (len(copies), made.problems) == (2, [])
    assert backup.verify(tmp_path / "made").problems == []
    found = snapshots_in(tmp_path / "made" / "training" / "journal.sqlite")
    assert found[model_id][-1].folder == names[0]
    kept = {path.name for path in (tmp_path / "made" / "training" / "snapshots").glob("*/")}
    assert kept - {""} >= {each.folder for some in found.values() for each in some}


async def test_an_older_snapshot_that_is_gone_is_struck_out(training: Path, tmp_path: Path) -> None:
    """Its model has a newer one, so nothing is lost."""
    models = snapshots_in(training / "journal.sqlite")
    model_id, found = next((m, found) for m, found in models.items() if len(found) == 2)
    shutil.rmtree(training / "snapshots" / found[0].folder)
    made = backup.create(tmp_path / "made", training=training)
    assert made.problems == []
    assert backup.verify(tmp_path / "made").problems == []
    copied = snapshots_in(tmp_path / "made" / "training" / "journal.sqlite")
    assert list(copied[model_id]) == [found[1]]


async def test_what_was_lost_before_is_said_and_the_rest_is_backed_up(
    training: Path, tmp_path: Path
) -> None:
    """One damaged model is no reason to have no back-up of the others."""
    models = snapshots_in(training / "journal.sqlite")
    newest = next(found[-1] for found in models.values() if found)
    shutil.rmtree(training / "snapshots" / newest.folder)
    made = backup.create(tmp_path / "made", training=training)
    assert made.problems == [f"snapshot {newest.folder} is not at its source"]
    assert backup.verify(tmp_path / "made").problems == [f"snapshot {newest.folder} is not there"]


def test_a_checkpoint_that_is_deleted_meanwhile_makes_another_round(
    keeper: Keeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server goes on all the time; what it deleted is in neither catalogue nor blobs."""

    def delete() -> None:
        page, _ = keeper.catalogue.page(model_id="", kind=None, before=None, size=9)
        keeper.catalogue.delete(page[0].path)
        keeper.sweep()

    folder = tmp_path / "checkpoints"
    copies = after_first(monkeypatch, "copy_catalogue", delete)
    made = backup.create(tmp_path / "made", checkpoints=folder)
    assert (len(copies), made.problems) == (2, [])
    assert backup.verify(tmp_path / "made").problems == []
    assert made.checkpoint_files == len(blobs(folder))
    keep(keeper, files(2), f"{PATH}-new")
    keeper.close()


def test_a_catalogue_that_never_stands_still_is_said_so(
    keeper: Keeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a torn copy nor an endless loop. Commits alone do not matter: they are in the log,
    and come along, as long as it is not copied into the file meanwhile."""
    file, place = tmp_path / "checkpoints" / "catalogue.sqlite", tmp_path / "copy.sqlite"
    copyfile, writes, names = shutil.copyfile, [0], itertools.count()
    monkeypatch.setattr(offline, "PAUSE_S", 0.0)
    monkeypatch.setattr(offline, "COPIES_MAX", 5)

    def busy(source: Path, target: Path) -> None:
        copyfile(source, target)
        if writes[0] > 0:
            writes[0] -= 1
            keep(keeper, files(1), f"{PATH}-{next(names)}")
            if settles:
                assert keeper.catalogue._transactions._settle()  # type: ignore[attr-defined]

    monkeypatch.setattr(offline.shutil, "copyfile", busy)
    monkeypatch.setattr(transactions, "SETTLE_S", 3600.0)
    writes[0], settles = 9, True
    with pytest.raises(CatalogueBusy, match="try again later"):
        copy_catalogue(file, place)
    copy_catalogue(file, place)
    assert _count(place) == 2 + 9
    writes[0], settles = 1, False
    monkeypatch.setattr(offline, "COPIES_MAX", 1)
    keep(keeper, files(1), PATH + "-last")
    copy_catalogue(file, place)
    assert _count(place) == 2 + 9 + 1 + 1
    keeper.close()


def _count(file: Path) -> int:
    with contextlib.closing(sqlite3.connect(file)) as db:
        return int(db.execute("SELECT count(*) FROM checkpoints").fetchone()[0])


async def test_two_restores_of_one_back_up_are_two_incarnations(
    training: Path, tmp_path: Path
) -> None:
    """Both fence off the server that had the journal before, and no number is given in both."""
    second = shutil.copytree(training, tmp_path / "second")
    found = []
    for folder, age_s in ((training, 60.0), (Path(second), 7200.0)):
        before = sqlite3.connect(folder / "journal.sqlite")
        (epoch,) = before.execute("SELECT value FROM meta WHERE name='epoch'").fetchone()
        before.close()
        begin_incarnation(folder / "journal.sqlite", age_s)
        store = SqliteStore(folder, sync=False)
        contents = await store.claim()
        await store.close()
        assert contents.epoch > epoch + 1000
        assert contents.incarnation > 0
        assert all(not model.parked for model in contents.models)
        for model in contents.models:
            assert model.calls[-1].seq_id == contents.incarnation << 20
            assert all(call.answer_digest is not None for call in model.calls)
        found.append((contents.epoch, contents.incarnation))
    begin_incarnation(training / "journal.sqlite", 0)
    store = SqliteStore(training, sync=False)
    third = await store.claim()
    await store.close()
    assert found[1][0] > found[0][0]
    assert third.incarnation > found[0][1]


async def test_however_old_a_back_up_is_its_epoch_is_one_that_saves_are_taken_in(
    training: Path,
) -> None:
    """Also where the clock is wrong: the Checkpoint server believes no epoch that restarts do not
    explain."""
    before = sqlite3.connect(training / "journal.sqlite")
    (epoch,) = before.execute("SELECT value FROM meta WHERE name='epoch'").fetchone()
    before.close()
    begin_incarnation(training / "journal.sqlite", 10 * 365 * 86_400)
    store = SqliteStore(training, sync=False)
    contents = await store.claim()
    await store.close()
    assert 1000 < contents.epoch - epoch <= EPOCH_STEP_MAX
