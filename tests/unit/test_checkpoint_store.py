"""Store and catalogue without a server: what is durable when, and what older servers left."""

import contextlib
import hashlib
import json
import os
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from checkpoints import LORA, PATH, blobs, files, keep, kept
from tinsmithd.checkpoint.catalogue import (
    Catalogue,
    CatalogueUnusable,
    catalogue_errors,
    owned,
    schema,
)
from tinsmithd.checkpoint.opening import open_keeper
from tinsmithd.checkpoint.rules import Header, Keeper, Write
from tinsmithd.checkpoint.store import Blob
from tinsmithd.domain import CheckpointPath, FullConfig, LoraConfig
from tinsmithd.errors import DataLoss, Reason, ResourceExhausted, Unavailable
from tinsmithd.formats import FormatUnknown


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


def opened(folder: Path) -> Keeper:
    return open_keeper(folder, checkpoint_bytes_max=1 << 30)


def events_of_a_save(
    keeper: Keeper, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, Path]]:
    """What a save makes durable and visible, in order."""
    events: list[tuple[str, Path]] = []
    fsync, replace, add = os.fsync, os.replace, Catalogue.add

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))

    def noted_replace(source: Path, place: Path) -> None:
        replace(source, place)
        events.append(("from", Path(source)))
        events.append(("to", Path(place)))

    def noted_add(self: Catalogue, *args: object, **kwargs: object) -> object:
        events.append(("commit", folder))
        return add(self, *args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as noting:
        noting.setattr(os, "fsync", noted_fsync)
        noting.setattr(os, "replace", noted_replace)
        noting.setattr(Catalogue, "add", noted_add)
        keep(keeper, files(0), overwrite=True)
    return events


def test_a_name_is_durable_before_the_catalogue_says_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I10 for a loss of power: file, then its folder and the folder of folders, then the commit.

    The folders too where the content was there: whoever moved it may have died before the sync.
    """
    keeper = opened(folder)
    events = events_of_a_save(keeper, folder, monkeypatch)
    keeper.close()
    assert events[-1] == ("commit", folder)
    assert len([event for event in events if event[0] == "to"]) == 4
    for index, (what, path) in enumerate(events):
        if what == "from":
            assert ("fsync", path) in events[:index]
        if what == "to":
            assert {("fsync", path.parent), ("fsync", folder / "blobs")} <= set(events[index:])
    keeper = opened(folder)
    again = events_of_a_save(keeper, folder, monkeypatch)
    assert not [event for event in again if event[0] == "to"]
    places = {("fsync", blob.parent) for blob in blobs(folder)} | {("fsync", folder / "blobs")}
    assert places <= set(again[: again.index(("commit", folder))])
    keeper.close()


def test_the_catalogue_is_durable_when_a_commit_returns(folder: Path) -> None:
    """WAL with synchronous=FULL, and no file in shared memory, which a full disk could break."""
    keeper = opened(folder)
    db = keeper.catalogue._db
    assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert db.execute("PRAGMA synchronous").fetchone()[0] == 2
    keep(keeper, files(0))
    assert not list(folder.glob("*-shm"))
    keeper.close()


def test_a_commit_that_failed_is_not_there_after_a_crash(folder: Path) -> None:
    """What may be in the log all the same is taken out before anything unused is removed."""
    keeper = opened(folder)
    keep(keeper, files(0))
    log = folder / "catalogue.sqlite-wal"
    assert log.stat().st_size
    keeper.catalogue._transactions._unsettled = True
    keeper._collector._everything = True
    keeper.sweep()
    assert log.stat().st_size == 0
    assert kept(keeper) == files(0)
    keeper.close()


def test_nothing_is_removed_on_the_word_of_a_damaged_catalogue(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 29: rows that vanished with a damaged page must not take their files along."""
    keeper = opened(folder)
    keep(keeper, files(0))
    keeper.catalogue.delete(CheckpointPath.parse(PATH))

    def damaged(db: sqlite3.Connection) -> None:
        raise ValueError("wrong # of entries in index")

    with monkeypatch.context() as broken:
        broken.setattr(schema, "check_whole", damaged)
        with pytest.raises(DataLoss):
            keeper.sweep()
        assert len(blobs(folder)) == 4
    keeper.sweep()
    assert not blobs(folder)
    keeper.close()


VERSION_1 = """
CREATE TABLE checkpoints (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    model_id TEXT NOT NULL,
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    base_model TEXT NOT NULL,
    lora TEXT NOT NULL,
    step_count INTEGER NOT NULL,
    create_time_s REAL NOT NULL,
    expire_time_s REAL,
    user_metadata TEXT NOT NULL,
    public INTEGER NOT NULL,
    UNIQUE (model_id, kind, name)
);
CREATE TABLE files (
    number INTEGER NOT NULL REFERENCES checkpoints ON DELETE CASCADE,
    name TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    PRIMARY KEY (number, name)
);
CREATE INDEX files_by_content ON files (sha256);
CREATE INDEX checkpoints_by_expiry ON checkpoints (expire_time_s);
PRAGMA user_version=1;
"""


def write_version_1(folder: Path, lora: str = json.dumps({"rank": 4})) -> None:
    """A folder as the servers before digests left it: an adapter and a full checkpoint."""
    keeper = opened(folder)
    found = keep(keeper, files(0))
    keeper.close()
    file = folder / "catalogue.sqlite"
    file.unlink()
    db = sqlite3.connect(file)
    db.execute("PRAGMA journal_mode=WAL")
    db.executescript(VERSION_1)
    insert = "INSERT INTO checkpoints VALUES (?,?,?,?,?,?,?,?,?,?,?)"
    later_s = time.time() + 1000
    rows = [
        (3, "run", "training", "one", "tiny", lora, 7, 12.5, None, '{"k": "ä"}', 1),
        (8, "run", "sampler", "full", "tiny", "null", 9, 13.0, later_s, "{}", 0),
    ]
    for row in rows:
        db.execute(insert, row)
        for blob in found.files:
            values = (row[0], blob.name, blob.size_bytes, blob.sha256)
            db.execute("INSERT INTO files VALUES (?,?,?,?)", values)
    db.commit()
    db.close()


def test_a_catalogue_of_version_1_is_taken_over(folder: Path) -> None:
    """Row 39: everything that it said is said again, now with digests; twice changes nothing."""
    write_version_1(folder)
    for _ in range(2):
        keeper = opened(folder)
        page, total = keeper.catalogue.page(model_id="", kind=None, before=None, size=9)
        full, lora = page
        assert (total, full.number, lora.number) == (2, 8, 3)
        assert full.tuning == FullConfig()
        assert full.expire_time_s is not None
        assert lora.tuning == LoraConfig(rank=4)
        assert (lora.step_count, lora.create_time_s, lora.expire_time_s) == (7, 12.5, None)
        assert lora.user_metadata == {"k": "ä"}
        assert kept(keeper) == files(0)
        assert keeper.catalogue._db.execute("PRAGMA user_version").fetchone()[0] == 4
        keeper.sweep()
        assert len(blobs(folder)) == 4
        keeper.close()
    keeper = opened(folder)
    assert keep(keeper, files(1), PATH + "-new").number > 8
    keeper.catalogue._db.execute("UPDATE checkpoints SET record=record || ' ' WHERE number=3")
    with pytest.raises(DataLoss):
        kept(keeper)
    keeper.close()


def test_a_catalogue_of_version_1_that_makes_no_sense_is_left_as_it_is(folder: Path) -> None:
    """Row 39: refused with a sentence, and the file is what it was."""
    write_version_1(folder, lora="{")
    for _ in range(2):
        with pytest.raises(CatalogueUnusable):
            opened(folder)
    db = sqlite3.connect(folder / "catalogue.sqlite")
    assert db.execute("PRAGMA user_version").fetchone()[0] == 1
    assert db.execute("SELECT count(*) FROM files").fetchone()[0] == 8
    db.close()


def test_a_catalogue_of_a_later_version_is_refused(folder: Path) -> None:
    """Row 39: says which it is and which this server knows."""
    opened(folder).close()
    db = sqlite3.connect(folder / "catalogue.sqlite")
    db.execute("PRAGMA user_version=5")
    db.close()
    with pytest.raises(
        FormatUnknown, match=r"format 5; this release, .*, knows format 4 and older"
    ):
        opened(folder)


def test_a_file_that_was_tampered_with_is_refused(folder: Path) -> None:
    """A trigger or another table is none of ours; SQLite would run the trigger."""
    opened(folder).close()
    db = sqlite3.connect(folder / "catalogue.sqlite")
    db.execute("CREATE TRIGGER t AFTER INSERT ON checkpoints BEGIN DELETE FROM writers; END")
    db.commit()
    db.close()
    with pytest.raises(CatalogueUnusable, match="tables"):
        opened(folder)


def test_a_catalogue_that_another_process_holds_is_unavailable(folder: Path) -> None:
    """SQLITE_BUSY passes by itself; a mistake of ours stays what it is."""
    opened(folder).close()
    other = sqlite3.connect(folder / "catalogue.sqlite", isolation_level=None)
    other.execute("PRAGMA locking_mode=EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    late = sqlite3.connect(folder / "catalogue.sqlite", timeout=0)
    with pytest.raises(Unavailable), catalogue_errors():
        late.execute("SELECT * FROM checkpoints")
    late.close()
    with pytest.raises(sqlite3.ProgrammingError), catalogue_errors():
        late.execute("SELECT 1")
    other.close()


def test_pages_are_full_although_some_rows_are_damaged(folder: Path) -> None:
    """What is left out is made up for from the next page: none ends early."""
    keeper = opened(folder)
    for n in range(6):
        keep(keeper, files(0), f"{PATH}{n}")
    keeper.catalogue._db.execute("UPDATE checkpoints SET digest='' WHERE number IN (3, 5)")
    page, total = keeper.catalogue.page(model_id="run", kind=None, before=None, size=3)
    assert [checkpoint.number for checkpoint in page] == [6, 4, 2]
    assert total == 6
    keeper.close()


def test_the_files_of_a_refused_name_are_swept(folder: Path) -> None:
    """Whoever is refused at the commit leaves nothing beyond the next sweep."""
    keeper = opened(folder)
    keep(keeper, files(0))
    keeper.sweep()
    with pytest.raises(Exception, match="exists"):
        keep(keeper, files(1))
    keeper.sweep()
    assert len(blobs(folder)) == 4
    assert keeper.catalogue.get(CheckpointPath.parse(PATH)).number == 1
    keeper.close()


def test_an_owner_who_commits_several_at_once_stays_within_the_limit(folder: Path) -> None:
    """Each was within it when its last byte came; a repeat of what is there is no more of it."""
    keeper = opened(folder)
    most = int(1.5 * sum(map(len, files(0).values())))

    def begun(name: str) -> tuple[Write, list[Blob]]:
        header = Header(
            path=CheckpointPath.parse(f"tinsmith://run/weights/{name}"),
            base_model="tiny",
            tuning=LORA,
            step_count=3,
            ttl_seconds=None,
            overwrite=False,
            user_metadata={},
            request_id=name,
        )
        write = keeper.begin(header, most)
        for file, data in files(0).items():
            write.append(file, 0, data)
        listed = [Blob(n, len(d), hashlib.sha256(d).hexdigest()) for n, d in files(0).items()]
        return write, listed

    def stored(begun: tuple[Write, list[Blob]]) -> bool:
        try:
            return bool(begun[0].commit(begun[1]))
        except ResourceExhausted as error:
            return error.reason is not Reason.QUOTA_EXCEEDED
        finally:
            begun[0].discard()

    with ThreadPoolExecutor(8) as beside:
        done = list(beside.map(stored, [begun(str(n)) for n in range(8)]))
    assert done.count(True) == 1
    assert keeper.catalogue.stored_bytes("default") <= most
    first = keeper.catalogue.page(model_id="", kind=None, before=None, size=9)[0][0].path
    assert stored(begun(first.name))
    with pytest.raises(ResourceExhausted):
        keeper.copy(first, CheckpointPath.parse(PATH + "-copy"), None, stored_max=most)
    assert not stored(begun("another"))
    keeper.close()


def test_a_catalogue_of_format_3_is_brought_up_to_date(folder: Path) -> None:
    """What it says is said again; it counts the checkpoints of a model, and has a second copy."""
    keeper = opened(folder)
    for n in range(3):
        keep(keeper, files(n), f"{PATH}{n}", ttl_seconds=1000)
    before, _ = keeper.catalogue.page(model_id="run", kind=None, before=None, size=9)
    keeper.close()
    file = folder / "catalogue.sqlite"
    with contextlib.closing(sqlite3.connect(file)) as db, db:
        for index in ("checkpoints_by_model", "tallies_by_public_id"):
            db.execute(f"DROP INDEX {index}")
        db.execute("DROP TABLE redo")
        db.execute("DELETE FROM tallies WHERE owner LIKE '/%'")
        db.executescript(owned.BY_PUBLIC_ID_3)
        db.execute("PRAGMA user_version=3")
    for _ in range(2):
        keeper = opened(folder)
        assert keeper.catalogue.page(model_id="run", kind=None, before=None, size=9) == (before, 3)
        keep(keeper, files(9), overwrite=True)
        keeper.catalogue.delete(CheckpointPath.parse(PATH))
        keeper.close()
    assert [path.name for path in folder.glob("*.format-*")] == ["catalogue.format-3.sqlite"]
