"""What another release wrote: brought up to date whole, or refused with a sentence (status 78)."""

import contextlib
import json
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import programs
from checkpoints import files, keep
from releases import recorded
from tinsmithd.checkpoint.opening import open_keeper
from tinsmithd.keys import KeyFile
from tinsmithd.training.journal import SqliteStore

HOPELESS = 78
KILLED = -9


def served(kind: str, folder: Path, **more: str) -> "subprocess.CompletedProcess[str]":
    """What a server says that ends by itself."""
    prefix = f"TINSMITH_{kind.upper()}_"
    own = {"LISTEN_ADDRESS": "127.0.0.1:0", "DATA_FOLDER": str(folder)}
    if kind == "training":
        own["LINK_ADDRESS"] = "127.0.0.1:0"
    return programs.run(
        f"tinsmithd.{kind}", **{prefix + name: value for name, value in own.items()}, **more
    )


@pytest.fixture
def training(tmp_path: Path) -> Path:
    """The data folder of a Training server of the first release."""
    recorded.unpack("0.1.0", tmp_path)
    return tmp_path / "data" / "training"


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """The data folder of a Checkpoint server, with a checkpoint."""
    keeper = open_keeper(tmp_path / "checkpoints", checkpoint_bytes_max=1 << 30)
    keep(keeper, files(0))
    keeper.close()
    return tmp_path / "checkpoints"


def format_of(file: Path) -> int:
    with contextlib.closing(sqlite3.connect(file)) as db:
        return int(db.execute("PRAGMA user_version").fetchone()[0])


def mark(file: Path) -> None:
    """Let a file of SQLite be of a later release."""
    with contextlib.closing(sqlite3.connect(file)) as db, db:
        db.execute("PRAGMA user_version=99")


def mark_folder(folder: Path) -> None:
    """Let a folder be of a later release."""
    (folder / "format.json").write_text(json.dumps({"format": 99, "release": "9.1.0"}))


@pytest.mark.parametrize(
    ("part", "mark"),
    [
        ("journal.sqlite", mark),
        ("snapshots", mark_folder),
    ],
)
def test_a_training_server_refuses_what_a_later_release_wrote(
    training: Path, part: str, mark: Callable[[Path], None]
) -> None:
    """The sentence names both formats and says what to do, and nothing is changed."""
    mark(training / part)
    before = (training / "journal.sqlite").read_bytes()
    done = served("training", training)
    assert done.returncode == HOPELESS
    last = done.stderr.splitlines()[-1]
    assert "has format 99" in last
    assert "knows format" in last
    assert "restore the back-up" in last
    assert (training / "journal.sqlite").read_bytes() == before


@pytest.mark.parametrize(("part", "mark"), [("catalogue.sqlite", mark), ("", mark_folder)])
def test_a_checkpoint_server_refuses_what_a_later_release_wrote(
    checkpoints: Path, part: str, mark: Callable[[Path], None]
) -> None:
    """Likewise."""
    mark(checkpoints / part)
    done = served("checkpoint", checkpoints)
    assert done.returncode == HOPELESS
    assert "has format 99" in done.stderr
    assert "restore the back-up" in done.stderr


def test_a_server_refuses_keys_of_a_later_release(tmp_path: Path) -> None:
    """It does not say that a new file would help: the keys in it are in use."""
    keys = tmp_path / "keys.json"
    KeyFile(keys).create("alice")
    keys.write_text(json.dumps({**json.loads(keys.read_text()), "format": 9}))
    done = served("checkpoint", tmp_path / "data", TINSMITH_CHECKPOINT_KEYS_FILE=str(keys))
    assert done.returncode == HOPELESS
    assert "has format 9, and this release knows 1" in done.stderr
    assert "keys create" not in done.stderr


async def test_a_server_that_dies_in_the_middle_of_a_migration_leaves_the_old_journal(
    training: Path,
) -> None:
    """It is the new format or the old one, whatever the moment; the next start finds everything."""
    file = training / "journal.sqlite"
    done = served("training", training, TINSMITH_FAILPOINTS="migrate_mid:kill")
    assert done.returncode == KILLED
    with contextlib.closing(sqlite3.connect(file)) as db:
        columns = {row[1] for row in db.execute("PRAGMA table_info(calls)")}
        epoch = db.execute("SELECT value FROM meta WHERE name='epoch'").fetchone()[0]
    assert {"result_digest", "plan"} < columns
    assert format_of(file) == 0
    store = SqliteStore(training, sync=True)
    contents = await store.claim()
    await store.close()
    assert contents.epoch == epoch + 1
    assert [len(model.calls) > 0 for model in contents.models] == [True, True]
    assert format_of(file) == 2
    kept = training / "journal.format-1.sqlite"
    with contextlib.closing(sqlite3.connect(kept)) as db:
        assert db.execute("SELECT count(plan) FROM calls").fetchone()[0] > 0
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
