"""SQLite's file of a catalogue, what stands beside it, and what a start makes of both."""

import random
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoints import PATH, TimedKeeper, files, keep, kept
from tinsmithd.checkpoint.catalogue import CatalogueUnusable, redo, schema, transactions
from tinsmithd.checkpoint.catalogue.sums import PageSums
from tinsmithd.checkpoint.opening import CATALOGUE_FILE
from tinsmithd.domain import CheckpointPath
from tinsmithd.errors import ResourceExhausted

WAL, REDO, SUMS = f"{CATALOGUE_FILE}-wal", "catalogue.redo", "catalogue.sums"


@pytest.fixture
def timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TimedKeeper]:
    """Its catalogue's log is copied into the file when a test says so."""
    monkeypatch.setattr(transactions, "SETTLE_S", 3600.0)
    with TimedKeeper.opened(tmp_path / "data") as timed:
        yield timed


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[sqlite3.Connection]:
    """How often SQLite was asked to look at all of a file."""
    found: list[sqlite3.Connection] = []
    look = schema.check_whole

    def noted(db: sqlite3.Connection) -> None:
        found.append(db)
        look(db)

    monkeypatch.setattr(schema, "check_whole", noted)
    return found


def settle(timed: TimedKeeper) -> None:
    assert timed.keeper.catalogue._transactions._settle()  # type: ignore[attr-defined]


def fill(timed: TimedKeeper) -> dict[str, dict[str, bytes]]:
    """Some commits of each kind; what is there after them."""
    for seed in range(4):
        keep(timed.keeper, files(seed), f"{PATH}{seed}")
    timed.keeper.catalogue.delete(CheckpointPath.parse(f"{PATH}1"))
    keep(timed.keeper, files(5), f"{PATH}2", overwrite=True)
    keep(timed.keeper, files(6), f"{PATH}1")
    timed.keeper.catalogue.delete(CheckpointPath.parse(f"{PATH}0"))
    return {f"{PATH}1": files(6), f"{PATH}2": files(5), f"{PATH}3": files(3)}


def copied(timed: TimedKeeper, folder: Path) -> Path:
    """The folder as a kill leaves it."""
    shutil.copytree(timed.folder, folder)
    return folder


def found(folder: Path) -> dict[str, dict[str, bytes]]:
    """All that a start finds there; the sums of it must be those of its rows."""
    timed = TimedKeeper(folder)
    try:
        catalogue = timed.keeper.catalogue
        page, total = catalogue.page(model_id="", kind=None, before=None, size=100)
        assert total == len(page)
        return {str(each.path): kept(timed.keeper, str(each.path)) for each in page}
    finally:
        timed.keeper.close()


# --- sums of pages --------------------------------------------------------------------------------


def test_a_start_asks_sqlite_only_where_pages_are_not_what_was_written(
    timed: TimedKeeper, tmp_path: Path, looks: list[sqlite3.Connection]
) -> None:
    """Not after a stop or a kill, wherever the log is; but after damage, and without sums."""
    expected = fill(timed)
    assert found(copied(timed, tmp_path / "with a log")) == expected
    settle(timed)
    assert found(copied(timed, tmp_path / "settled")) == expected
    keep(timed.keeper, files(7), f"{PATH}7")
    expected[f"{PATH}7"] = files(7)
    assert found(copied(timed, tmp_path / "with another log")) == expected
    timed.restart()
    timed.restart()
    assert not looks
    for n, left in enumerate((None, b"", b"tinsums1")):
        folder = copied(timed, tmp_path / f"lost {n}")
        (folder / SUMS).unlink() if left is None else (folder / SUMS).write_bytes(left)
        assert found(folder) == found(folder) == expected
        assert len(looks) == n + 1


def test_every_damage_of_a_page_differs_from_its_sum(timed: TimedKeeper, tmp_path: Path) -> None:
    """One bit of each page, a page that is another's, one that is lost, and one too many."""
    fill(timed)
    timed.keeper.close()
    file, other = timed.folder / CATALOGUE_FILE, tmp_path / "other.sqlite"
    shutil.copy(timed.folder / SUMS, tmp_path / "other.sums")
    sums, intact = PageSums(other, tmp_path / "none"), file.read_bytes()
    rng = random.Random(53)
    damaged = []
    for start in range(0, len(intact), 4096):
        at = start + rng.randrange(4096)
        damaged.append(intact[:at] + bytes([intact[at] ^ 1 << rng.randrange(8)]) + intact[at + 1 :])
    damaged.append(intact[:4096] + intact[8192:12288] + intact[4096:8192] + intact[12288:])
    damaged += [intact[:-4096], intact[:-1], intact + intact[-4096:]]
    for data in damaged:
        other.write_bytes(data)
        assert not sums.match()
    other.write_bytes(intact)
    assert sums.match()
    other.write_bytes(intact + bytes(4096))  # SQLite may leave out what it does not use
    assert sums.match()


def test_a_tally_that_is_damaged_is_made_anew(timed: TimedKeeper, tmp_path: Path) -> None:
    """No page is broken by it, and SQLite finds nothing wrong."""
    expected = fill(timed)
    timed.keeper.close()
    with sqlite3.connect(timed.folder / CATALOGUE_FILE) as db:
        db.execute("UPDATE tallies SET checkpoints=checkpoints+1, nbytes=7")
    db.close()
    assert found(timed.folder) == expected


# --- redo -----------------------------------------------------------------------------------------


def test_a_damaged_log_loses_no_commit(timed: TimedKeeper, tmp_path: Path) -> None:
    """SQLite drops what follows the damage: it is made again. Of both, the log or its second copy,
    one is enough."""
    keep(timed.keeper, files(9), f"{PATH}9")
    settle(timed)
    expected = {**fill(timed), f"{PATH}9": files(9)}
    rng = random.Random(1)
    for trial in range(30):
        folder = copied(timed, tmp_path / str(trial))
        victim = folder / (WAL if trial % 3 else REDO)
        data = bytearray(victim.read_bytes())
        # Its end is what was there before it was begun anew.
        data[rng.randrange(len(data) // 2)] ^= 1 << rng.randrange(8)
        victim.write_bytes(data[: rng.randrange(len(data))] if trial % 5 == 0 else data)
        assert found(folder) == expected
        shutil.rmtree(folder)


def test_what_was_settled_needs_no_log(timed: TimedKeeper, tmp_path: Path) -> None:
    """Neither SQLite's nor the other one; and what the log had hides nothing any more."""
    expected = fill(timed)
    settle(timed)
    for n, lost in enumerate(([WAL], [REDO], [WAL, REDO], [WAL, REDO, SUMS])):
        folder = copied(timed, tmp_path / str(n))
        for name in lost:
            (folder / name).unlink()
        assert found(folder) == expected
    log = (timed.folder / WAL).read_bytes()
    keep(timed.keeper, files(7), f"{PATH}7")
    settle(timed)
    folder = copied(timed, tmp_path / "old")
    (folder / WAL).write_bytes(log[: len(log) // 2])
    assert found(folder) == {**expected, f"{PATH}7": files(7)}


def test_a_commit_that_failed_is_not_made_again(timed: TimedKeeper, tmp_path: Path) -> None:
    """Nor does it keep the next one from being found."""
    expected = fill(timed)
    db = timed.keeper.catalogue._db
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA max_page_count={pages}")

    def fill_pages() -> None:
        while True:
            name = f"{PATH}-{'long' * 30}-{len(expected)}"
            keep(timed.keeper, files(0), name)
            expected[name] = files(0)

    with pytest.raises(ResourceExhausted):
        fill_pages()
    folder = copied(timed, tmp_path / "failed")
    (folder / WAL).unlink()
    assert found(folder) == expected
    db.execute("PRAGMA max_page_count=1000000")
    keep(timed.keeper, files(8), f"{PATH}8")
    folder = copied(timed, tmp_path / "next")
    (folder / WAL).unlink()
    assert found(folder) == {**expected, f"{PATH}8": files(8)}


def test_commits_that_do_not_fit_are_settled(
    timed: TimedKeeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second copy has a fixed size; SQLite's file is another."""
    monkeypatch.setattr(redo, "REDO_BYTES", 4000)
    expected = fill(timed)
    folder = copied(timed, tmp_path / "copy")
    (folder / WAL).unlink()
    assert found(folder) == expected


def test_a_catalogue_older_than_what_is_beside_it_is_refused(
    timed: TimedKeeper, tmp_path: Path
) -> None:
    """Commits in between are nowhere: to go on would undo them without a word."""
    keep(timed.keeper, files(0))
    settle(timed)
    folder = copied(timed, tmp_path / "copy")
    (folder / WAL).unlink()
    fill(timed)
    settle(timed)
    keep(timed.keeper, files(7), f"{PATH}7")
    shutil.copy(timed.folder / REDO, folder / REDO)
    with pytest.raises(CatalogueUnusable, match="it is older"):
        TimedKeeper(folder)
    (folder / REDO).unlink()
    assert set(found(folder)) == {PATH}


@pytest.mark.parametrize("spoil", ["DELETE FROM redo", "UPDATE redo SET position=position+1000"])
def test_a_catalogue_that_does_not_know_what_is_in_it_has_what_sqlite_says(
    timed: TimedKeeper, tmp_path: Path, spoil: str
) -> None:
    """The log is not lost, too; and from then on the second copy is one again."""
    expected = fill(timed)
    timed.keeper.close()
    with sqlite3.connect(timed.folder / CATALOGUE_FILE) as db:
        db.execute(spoil)
    db.close()
    assert found(timed.folder) == expected
    timed.start()
    keep(timed.keeper, files(7), f"{PATH}7")
    folder = copied(timed, tmp_path / "copy")
    (folder / WAL).unlink()
    assert found(folder) == {**expected, f"{PATH}7": files(7)}
