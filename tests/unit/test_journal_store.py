"""What the journal keeps: whole and as it was written."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from journals import (
    OPEN,
    TRIMMED,
    Sim,
    SqliteDisk,
    answer,
    begun,
    call,
    model,
    record,
    stored,
    work,
)
from tinsmithd.training.journal import Fenced, StoreDamaged, sqlite_store, sqlite_tables
from tinsmithd.training.journal import records as j


@pytest.fixture(params=[SqliteDisk, Sim])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return request.param(tmp_path / "journal")


@pytest.fixture
def sqlite_disk(tmp_path: Path) -> SqliteDisk:
    return SqliteDisk(tmp_path / "journal")


# --- every store ------------------------------------------------------------------------------


async def test_what_is_committed_is_there_after_a_reopen(disk: Any) -> None:
    """A commit is what the next process finds, models by number and calls by position."""
    store = await begun(disk, call(1), call(2), call(3), j.AddSnapshot("a", 1, 5, "folder"))
    await store.commit([record(1), record(2, keep=False)])
    await store.close()
    store = disk.store()
    contents = await store.claim()
    calls = [stored(1), stored(2, answer_bytes=0), stored(3, **OPEN)]
    assert list(contents.models) == [
        j.StoredModel("a", 1, {"base": "ü"}, "", 0, calls, [j.StoredSnapshot(1, 5, "folder")]),
        j.StoredModel("b", 2, {"r": 4}, "", 0, [], []),
    ]
    assert list(await store.calls("a", 1)) == calls[1:]
    assert list(await store.calls("unknown", 0)) == []
    assert [await store.work("a", position) for position in (1, 2, 3)] == [*map(work, (1, 2, 3))]
    assert await store.answer("a", 1) == answer(1)
    for position in (2, 3):
        with pytest.raises(StoreDamaged):
            await store.answer("a", position)
    await store.close()


async def test_what_is_never_made_again_keeps_no_payload(disk: Any) -> None:
    """A forward, say: any number of them leaves answers alone, and those only for a while."""
    forward = j.AddAnswer("a", 1, answer(1))
    store = await begun(disk, call(1), forward, call(2), record(2))
    with pytest.raises(StoreDamaged):
        await store.work("a", 1)
    await store.commit([j.DropAnswers("a", 2)])
    found = await model(disk, store)
    assert found.calls == [stored(2, answer_bytes=0)]


async def test_a_claim_fences_whoever_had_the_store(disk: Any) -> None:
    """After a claim of a higher epoch the earlier process neither writes nor reads."""
    old = await begun(disk, call(1), record(1))
    new = disk.store()
    first, second = await new.claim(), await disk.store().claim()
    assert (first.epoch, second.epoch) == (2, 3)
    assert first.cluster_id == second.cluster_id != ""
    for store in (old, new):
        tries = [
            *(store.commit([call(2)]), store.commit([]), store.commit([j.DeleteModel("a")])),
            *(store.calls("a", 0), store.work("a", 1), store.answer("a", 1)),
            store.work("a", 9),
        ]
        for attempt in tries:
            with pytest.raises(Fenced):
                await attempt
    await new.close()
    assert (await model(disk, old)).calls == [stored(1)]


async def test_a_commit_without_room_is_absent_and_nothing_is_broken(disk: Any) -> None:
    """A full disk refuses the whole commit and is said to be full; reads and later writes work."""
    store = await begun(disk, call(1))
    writes = [j.CountAttempt("a", 1, 1), j.LoseModel("b", "why"), *map(call, range(2, 40))]
    async with disk.full(store):
        for _ in range(2):
            with pytest.raises(j.StoreUnwritable) as refused:
                await store.commit(writes)
            assert refused.value.full
        assert list(await store.calls("a", 0)) == [stored(1, **OPEN)]
        assert await store.work("a", 1) == work(1)
    assert list(await store.calls("a", 0)) == [stored(1, **OPEN)]
    await store.commit([])
    await store.commit(writes)
    found = await model(disk, store)
    assert found.calls[0] == stored(1, **OPEN, attempts=1)
    assert [each.position for each in found.calls] == [*range(1, 40)]


async def test_trim_drops_payloads_snapshots_and_calls_without_answer(disk: Any) -> None:
    """Kept answers and everything later stay, and so does the newest call: the next number."""
    store = await begun(disk, *map(call, range(1, 7)), record(1), record(2), record(4))
    await store.commit([record(3, keep=False), *(j.AddSnapshot("a", n, n, f"{n}") for n in (2, 4))])
    await store.commit([j.Trim("a", 4), j.Trim("a", 2), j.Trim("unknown", 9)])
    assert await store.answer("a", 4) == answer(4)
    with pytest.raises(StoreDamaged):
        await store.work("a", 4)
    assert await store.work("a", 5) == work(5)
    found = await model(disk, store)
    assert found.trimmed_to == 4
    assert found.snapshots == [j.StoredSnapshot(4, 4, "4")]
    kept = [stored(position, **TRIMMED) for position in (1, 2, 4)]
    assert found.calls == [*kept, stored(5, **OPEN), stored(6, **OPEN)]
    store = disk.store()
    await store.claim()
    await store.commit([j.Trim("a", 100)])
    found = await model(disk, store)
    assert found.calls == [*kept, stored(6, **{**OPEN, **TRIMMED})]
    assert (found.snapshots, found.trimmed_to) == ([], 100)


async def test_a_call_goes_with_the_last_of_payload_and_answer(disk: Any) -> None:
    """Dropped answers leave their digests while payloads stay; a call with neither goes."""
    store = await begun(disk, *map(call, (1, 2, 3, 4)), *map(record, (1, 2, 3, 4)))
    await store.commit([j.DropAnswers("a", 2)])
    dropped = [stored(position, answer_bytes=0) for position in (1, 2)]
    assert list(await store.calls("a", 0)) == [*dropped, stored(3), stored(4)]
    with pytest.raises(StoreDamaged):
        await store.answer("a", 2)
    assert await store.work("a", 2) == work(2)
    await store.commit([j.Trim("a", 4), j.DropAnswers("a", 3)])
    assert await store.answer("a", 4) == answer(4)
    assert (await model(disk, store)).calls == [stored(4, **TRIMMED)]


async def test_forgotten_calls_free_their_places(disk: Any) -> None:
    """Of a forgotten call nothing stays, and its place can be used again."""
    store = await begun(disk, *map(call, (1, 2, 3)), record(3), call(2, "b"))
    await store.commit([j.ForgetCalls("a", [2, 3, 9]), j.ForgetCalls("a", [])])
    for read in (store.work, store.answer):
        with pytest.raises(StoreDamaged):
            await read("a", 3)
    again = j.AddCall("a", 2, 12, b"02" * 16, work(2))
    await store.commit([again, record(2), call(3)])
    assert await store.work("b", 2) == work(2)
    assert (await model(disk, store)).calls == [stored(1, **OPEN), stored(2), stored(3, **OPEN)]


async def test_what_is_said_of_a_model_is_said_of_it_alone(disk: Any) -> None:
    """Why it is lost, attempts of a call, and the newest snapshot of a position are kept."""
    store = await begun(disk, call(1), call(2), call(1, "b"), j.AddSnapshot("a", 1, 1, "old"))
    await store.commit(
        [j.LoseModel("a", "gone"), j.CountAttempt("a", 2, 1), j.CountAttempt("a", 9, 1)]
    )
    await store.commit([j.CountAttempt("a", 2, 3), j.AddSnapshot("a", 1, 2, "new")])
    found = await model(disk, store)
    assert found.lost == "gone"
    assert found.calls == [stored(1, **OPEN), stored(2, **OPEN, attempts=3)]
    assert found.snapshots == [j.StoredSnapshot(1, 2, "new")]
    assert await model(disk, disk.store(), "b") == j.StoredModel(
        "b", 2, {"r": 4}, "", 0, [stored(1, **OPEN)], []
    )


async def test_a_deleted_model_leaves_nothing_behind(disk: Any) -> None:
    """Not even what is written for it afterwards, in the same commit or a later one."""
    late = [
        call(2),
        record(1),
        record(2),
        j.AddSnapshot("a", 2, 1, "x"),
        j.CountAttempt("a", 1, 2),
    ]
    late += [
        j.LoseModel("a", "why"),
        j.Trim("a", 1),
        j.DropAnswers("a", 1),
        j.ForgetCalls("a", [1]),
    ]
    store = await begun(disk, call(1), record(1), j.AddSnapshot("a", 1, 1, "x"), call(1, "b"))
    await store.commit([j.DeleteModel("a"), *late])
    await store.commit([*late, j.DeleteModel("a"), j.DeleteModel("unknown")])
    assert await store.work("b", 1) == work(1)
    await store.commit([j.DeleteModel("b")])
    assert disk.rows() == 0
    await store.commit([j.AddModel("a", 3, {})])
    assert await model(disk, store) == j.StoredModel("a", 3, {}, "", 0, [], [])


async def test_a_model_that_is_to_be_remembered_is(disk: Any) -> None:
    """What was written of it when it came is there for whoever claims the store."""
    store = await begun(disk, j.AddModel("c", 3, {"r": 8}), call(1))
    await store.commit([j.DeleteModel("b", remember=True), j.DeleteModel("c"), call(2, "b")])
    await store.commit([j.DeleteModel("b", remember=True), j.DeleteModel("a", remember=True)])
    contents = await disk.store().claim()
    assert contents.models == []
    found = {gone.model_id: (gone.number, gone.about) for gone in contents.deleted}
    assert found == {"a": (1, {"base": "ü"}), "b": (2, {"r": 4})}


async def test_the_newest_steps_are_remembered(disk: Any) -> None:
    """Of each model, in pages, whatever is trimmed; they go with their model."""
    store = await begun(disk, call(1), record(1))
    steps = [j.StoredStep(n, n + 1, n + 2, n / 3, {"grad_norm:last": n / 7}) for n in range(1, 7)]
    await store.commit([j.AddStep("a", step, 4) for step in steps])
    await store.commit([j.AddStep("b", steps[0], 4), j.AddStep("c", steps[0], 4), j.Trim("a", 6)])
    await store.close()
    store = disk.store()
    await store.claim()
    assert await store.steps("a", None, 3) == (steps[:2:-1], 4)
    assert await store.steps("a", 4, 3) == ([steps[2]], 4)
    assert await store.steps("b", None, 9) == ([steps[0]], 1)
    await store.commit([j.DeleteModel("a")])
    assert await store.steps("a", None, 3) == ([], 0)
    assert await store.steps("c", None, 3) == ([], 0)


async def test_a_parked_call_is_there_until_it_has_its_place(disk: Any) -> None:
    """In the order of numbers; `AddCall` and `UnparkCalls` take it out, and so does a deletion."""
    store = await begun(disk)
    parked = [j.ParkedCall(n, b"%d" % n, work(n)) for n in (12, 13, 14)]
    await store.commit([j.ParkCall("a", each.seq_id, each.digest, each.work) for each in parked])
    await store.commit([j.ParkCall("b", 9, b"9", work(9)), j.ParkCall("c", 9, b"9", work(9))])
    assert await store.parked("a") == parked
    await store.close()
    store = disk.store()
    contents = await store.claim()
    assert [found.parked for found in contents.models] == [(12, 13, 14), (9,)]
    await store.commit([call(2), j.UnparkCalls("a", [14, 99]), j.DeleteModel("b")])
    assert await store.parked("a") == parked[1:2]
    assert await store.parked("b") == []


async def test_a_chosen_id_outlives_its_model(disk: Any) -> None:
    """In the order of creation, for whoever claims the store; one that was not chosen does not."""
    store = await begun(disk, j.AddModel("c", 3, {}))
    await store.commit([j.DeleteModel("b", keep_id=True), j.DeleteModel("c")])
    await store.commit([j.DeleteModel("b", keep_id=True), j.DeleteModel("a", keep_id=True)])
    contents = await disk.store().claim()
    assert (list(contents.used_ids), contents.deleted) == (["a", "b"], [])


# --- SQLite -----------------------------------------------------------------------------------


async def test_the_newest_deleted_models_are_remembered(
    sqlite_disk: SqliteDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many of them, by when they came; a damaged one is passed over and the log says so."""
    monkeypatch.setattr(sqlite_tables, "DELETED_KEPT_MAX", 2)
    store = await begun(sqlite_disk, j.AddModel("c", 3, {}), j.AddModel("d", 4, {}))
    for model_id in "dcba":
        await store.commit([j.DeleteModel(model_id, remember=True)])
    contents = await sqlite_disk.store().claim()
    assert [gone.model_id for gone in contents.deleted] == ["c", "d"]
    sqlite_disk.tamper("UPDATE deleted SET number=9 WHERE model_id='c'")
    contents = await sqlite_disk.store().claim()
    assert [gone.model_id for gone in contents.deleted] == ["d"]


async def test_the_newest_chosen_ids_are_remembered(
    sqlite_disk: SqliteDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many of them, by when their models came; a damaged one is passed over."""
    monkeypatch.setattr(sqlite_tables, "USED_IDS_KEPT_MAX", 2)
    store = await begun(sqlite_disk, j.AddModel("c", 3, {}), j.AddModel("d", 4, {}))
    for model_id in "dcba":
        await store.commit([j.DeleteModel(model_id, keep_id=True)])
    assert (await sqlite_disk.store().claim()).used_ids == ["c", "d"]
    sqlite_disk.tamper("UPDATE used_ids SET model_id='x' WHERE model_id='c'")
    assert (await sqlite_disk.store().claim()).used_ids == ["d"]


async def test_a_commit_that_fails_midway_is_absent(
    sqlite_disk: SqliteDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither an error nor a death between the writes and the commit leaves a part of them."""
    store = await begun(sqlite_disk, call(1))
    with pytest.raises(TypeError):
        await store.commit([j.CountAttempt("a", 1, 1), j.AddModel("c", 3, {"not": b"JSON"})])
    died = SqliteDisk(sqlite_disk.folder.with_name("died"))

    def die(name: str) -> None:
        shutil.copytree(sqlite_disk.folder, died.folder, ignore=shutil.ignore_patterns("*-shm"))
        raise OSError("no more")

    with monkeypatch.context() as dying:
        dying.setattr(sqlite_store.failpoints, "hit", die)
        with pytest.raises(j.StoreUnwritable):
            await store.commit([j.CountAttempt("a", 1, 1), *map(call, range(2, 40))])
    assert (await model(sqlite_disk, store)).calls == [stored(1, **OPEN)]
    assert (await model(died, died.store())).calls == [stored(1, **OPEN)]
