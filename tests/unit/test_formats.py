"""Formats of files: what is refused, what is brought up to date, and in which order."""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinsmithd import formats
from tinsmithd.gateway.problems import Problem
from tinsmithd.gateway.tinker.promises import promise_id, read_promise


def _adding(name: str) -> formats.Migration:
    def change(db: sqlite3.Connection) -> None:
        db.execute(f"ALTER TABLE t ADD COLUMN {name} TEXT")

    return formats.Migration(int(name[-1]), change)


THREE = formats.SqliteFormat("the file", (_adding("c2"), _adding("c3")))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file in format 1."""
    with contextlib.closing(sqlite3.connect(tmp_path / "a.sqlite")) as db, db:
        db.execute("CREATE TABLE t (c1 TEXT)")
        db.execute("INSERT INTO t VALUES ('kept')")
        db.execute("PRAGMA user_version=1")
    return tmp_path / "a.sqlite"


@contextlib.contextmanager
def opened(file: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as db:
        yield db


def bring_up(file: Path, form: formats.SqliteFormat) -> None:
    with opened(file) as db:
        form.look(db, file)
        db.execute("BEGIN IMMEDIATE")
        form.bring_up(db)
        db.execute("COMMIT")


@pytest.mark.parametrize("at", [1, 2, 3])
def test_migrations_run_in_order_from_the_format_that_is_there(file: Path, at: int) -> None:
    """Each is made once; what was there before is kept beside it."""
    if at > 1:
        bring_up(file, formats.SqliteFormat("the file", THREE.migrations[: at - 1]))
        formats.copy_of(file, 1).unlink()
    for _ in range(2):
        bring_up(file, THREE)
    with opened(file) as db:
        assert [row[1] for row in db.execute("PRAGMA table_info(t)")] == ["c1", "c2", "c3"]
        assert db.execute("SELECT c1 FROM t").fetchone() == ("kept",)
        assert THREE.read(db) == 3
    kept = [path.name for path in file.parent.glob("a.format-*")]
    assert kept == ([f"a.format-{at}.sqlite"] if at < 3 else [])


def test_a_later_format_is_refused_in_both_numbers(file: Path) -> None:
    """It says which it is, who wrote it, and what this release knows."""
    older = formats.SqliteFormat("the file", THREE.migrations[:1], written_by=lambda db: "9.1.0")
    bring_up(file, THREE)
    with opened(file) as db, pytest.raises(formats.FormatUnknown) as refused:
        older.look(db, file)
    assert "has format 3, written by release 9.1.0" in str(refused.value)
    assert "knows format 2 and older" in str(refused.value)


def test_a_failed_migration_changes_nothing(file: Path) -> None:
    """One transaction: the first step goes with the second."""

    def fail(db: sqlite3.Connection) -> None:
        raise ValueError("no")

    broken = formats.SqliteFormat("the file", (_adding("c2"), formats.Migration(3, fail)))
    with opened(file) as db:
        broken.look(db, file)
        db.execute("BEGIN IMMEDIATE")
        with pytest.raises(ValueError, match="no"):
            broken.bring_up(db)
        db.execute("ROLLBACK")
        assert broken.read(db) == 1
        assert [row[1] for row in db.execute("PRAGMA table_info(t)")] == ["c1"]


def test_a_folder_says_its_format(tmp_path: Path) -> None:
    """One of the first release says none, and is marked; a later one is refused."""
    formats.check_folder(tmp_path, "the folder", 1)
    formats.check_folder(tmp_path, "the folder", 1)
    formats.check_folder(tmp_path, "the folder", 2)
    with pytest.raises(formats.FormatUnknown, match=r"the folder .* has format 2, written by"):
        formats.check_folder(tmp_path, "the folder", 1)


def test_a_promise_of_a_later_gateway_is_asked_for_again() -> None:
    """Gateways of two releases are side by side: it is no unknown request, and no result."""
    name = promise_id("step", {"model_id": "a", "seq_id": 1})
    assert read_promise(name) == ("step", {"model_id": "a", "seq_id": 1})
    with pytest.raises(Problem) as refused:
        read_promise(name.replace("step-", "step.2-"))
    assert (refused.value.status, refused.value.retry_after_s) == (503, 1.0)
    with pytest.raises(Problem) as unknown:
        read_promise("step-nonsense")
    assert unknown.value.status == 404
