"""Which files checkpoints refer to, how many each owner and model has: as their rows say it."""

import contextlib
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoints import LORA
from tinsmithd.checkpoint.catalogue import (
    Catalogue,
    Checkpoint,
    open_local,
    owned,
    tallies,
    transactions,
)
from tinsmithd.checkpoint.catalogue.record import places_of
from tinsmithd.checkpoint.store import Blob
from tinsmithd.domain import CheckpointKind, CheckpointPath
from tinsmithd.errors import DataLoss

PLACES = [f"{n:02x}" * 32 for n in range(12)]
OWNERS = ("default", "alice", "alice-2", "bob")
NOW_S = time.time()


@pytest.fixture
def catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Catalogue]:
    monkeypatch.setattr(transactions, "SETTLE_S", 3600.0)  # these tests look past its lock
    monkeypatch.setattr(transactions, "COMMITS_MAX", 10**9)
    opened = open_local(tmp_path / "catalogue.sqlite", may_be_new=True)
    with contextlib.closing(Catalogue(opened, lambda: NOW_S)) as catalogue:
        yield catalogue


def checkpoint(rng: random.Random, name: str = "") -> Checkpoint:
    """One of few models of few owners, which have the same ids, with some of few files."""
    kind = rng.choice(list(CheckpointKind))
    path = CheckpointPath(f"m{rng.randrange(3)}", kind, name or f"n{rng.randrange(4)}")
    files = rng.sample(PLACES, rng.randrange(1, 4))
    return Checkpoint(
        path=path.of(rng.choice(OWNERS)),
        base_model="tiny",
        tuning=LORA,
        step_count=0,
        create_time_s=NOW_S,
        expire_time_s=rng.choice([None, NOW_S - 1, NOW_S + 1000]),
        user_metadata={},
        files=[Blob(f"f{n}", rng.randrange(100), place) for n, place in enumerate(files)],
    )


def change(catalogue: Catalogue, rng: random.Random) -> None:
    """Add, overwrite, delete, expire, or let live longer."""
    kind = rng.random()
    if kind < 0.6:
        catalogue.add(checkpoint(rng), overwrite=True)
        return
    numbers = [row["number"] for row in catalogue._db.execute("SELECT number FROM checkpoints")]
    if kind < 0.8:
        catalogue.delete_expired(numbers)
    elif numbers:
        page, _ = catalogue.page(model_id="", kind=None, before=None, size=100)
        if page:
            catalogue.delete(rng.choice(page).path)


def referred(catalogue: Catalogue) -> set[str]:
    rows = catalogue._db.execute("SELECT * FROM checkpoints").fetchall()
    return {place for row in rows for place in places_of(row)}


@pytest.mark.parametrize("seed", range(20))
def test_what_is_unused_is_what_no_row_says(catalogue: Catalogue, seed: int) -> None:
    """Also of what changes while rows are read, before and behind where the reading is."""
    rng = random.Random(seed)
    for _ in range(30):
        change(catalogue, rng)
    references = catalogue.references
    assert references.take_dropped() is None
    assert list(references.unused(PLACES)) == []
    reading = references.read(3, whole=False)
    for _ in reading:
        for _ in range(rng.randrange(3)):
            change(catalogue, rng)
    dropped: set[str] = set()
    for _ in range(40):
        assert set(references.unused(PLACES)) == set(PLACES) - referred(catalogue)
        before = referred(catalogue)
        change(catalogue, rng)
        taken = references.take_dropped()
        assert taken is not None
        dropped |= set(taken)
        assert before - referred(catalogue) <= dropped


def test_a_row_that_is_damaged_makes_nothing_unused(catalogue: Catalogue) -> None:
    """Before it goes nobody knows what is; when it went the others are read again."""
    rng = random.Random(1)
    first, second = checkpoint(rng, "first"), checkpoint(rng, "second")
    for each in (first, second):
        catalogue.add(each, overwrite=True)
    list(catalogue.references.read(10, whole=True))
    catalogue._db.execute("UPDATE checkpoints SET record='{' WHERE name='first'")
    catalogue.delete(first.path)
    assert catalogue.references.take_dropped() is None
    assert list(catalogue.references.unused(PLACES)) == []
    catalogue._db.execute("UPDATE checkpoints SET digest='' WHERE name='second'")
    with pytest.raises(DataLoss):
        list(catalogue.references.read(10, whole=False))
    assert list(catalogue.references.unused(PLACES)) == []


@pytest.mark.parametrize("seed", range(5))
def test_tallies_are_what_rows_add_up_to(catalogue: Catalogue, seed: int) -> None:
    """Of each owner and each model; counted anew, of one or of all, they are the same."""
    rng = random.Random(seed)
    for _ in range(80):
        change(catalogue, rng)
    db = catalogue._db

    def all_tallies() -> set[tuple[object, ...]]:
        return {tuple(row) for row in db.execute("SELECT * FROM tallies")}

    kept = all_tallies()
    for owner in ("", *OWNERS):
        tallies.count_anew(db, owner)
        assert all_tallies() == kept
    for owner in (*OWNERS, "*"):
        for model_id in ("", "m0", "m1", "m2", "none"):
            for kind in (None, *CheckpointKind):
                which = {"owner": owner, "model_id": model_id, "kind": kind}
                found, total = catalogue.page(**which, before=None, size=1000)  # type: ignore[arg-type]
                assert total == len(found)
                assert [each.number for each in found] == sorted(
                    (
                        row["number"]
                        for row in db.execute("SELECT * FROM checkpoints")
                        if _fits(row, owner, model_id, kind)
                    ),
                    reverse=True,
                )


def _fits(row: object, owner: str, model_id: str, kind: CheckpointKind | None) -> bool:
    inner, its_kind, expires_s = (row[name] for name in ("model_id", "kind", "expire_time_s"))  # type: ignore[index]
    path = CheckpointPath(inner, its_kind, "n")
    lives = expires_s is None or expires_s > NOW_S
    return (
        lives
        and owner in ("*", path.owner)
        and model_id in ("", inner.rpartition("/")[2])
        and kind in (None, its_kind)
    )


@pytest.mark.parametrize("owner", ["default", "alice", "*"])
@pytest.mark.parametrize("model_id", ["", "m1"])
@pytest.mark.parametrize("kind", [None, CheckpointKind.SAMPLER])
def test_a_page_of_an_owner_is_read_in_the_order_of_an_index(
    catalogue: Catalogue, owner: str, model_id: str, kind: CheckpointKind | None
) -> None:
    """Nothing is sorted, and no more is read than is shown: a model may have a million."""
    rng, asked = random.Random(1), list[str]()
    for _ in range(20):
        change(catalogue, rng)
    catalogue._db.set_trace_callback(asked.append)
    owned.newest_first(catalogue._db, owner, model_id, kind, 1000, NOW_S, 100)
    owned.count(catalogue._db, owner, model_id, kind, NOW_S)
    catalogue._db.set_trace_callback(None)
    queries = [query for query in asked if query.startswith("SELECT")]
    assert len(queries) >= 2
    for query in queries:
        plan = [row["detail"] for row in catalogue._db.execute(f"EXPLAIN QUERY PLAN {query}")]
        assert all("SEARCH" in step and "TEMP B-TREE" not in step for step in plan), (query, plan)
