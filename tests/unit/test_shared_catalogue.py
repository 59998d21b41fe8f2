"""Several keepers over one object store: what they agree on, and what one of them may lose."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from checkpoints import LEASE_S, LORA, PATH, files, keep, kept
from replicas import Replicas, listed, path
from tinsmithd.checkpoint.catalogue import CatalogueUnusable, Checkpoint, Writer, shared, view
from tinsmithd.checkpoint.opening import VIEW_FILE, open_keeper
from tinsmithd.checkpoint.rules import Keeper
from tinsmithd.checkpoint.store import Blob, StoreUnusable
from tinsmithd.checkpoint.store.object import log as object_log
from tinsmithd.checkpoint.store.object.log import ObjectLog
from tinsmithd.errors import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    NotFound,
    Reason,
    Unavailable,
)


def test_what_one_commits_is_there_at_once_for_the_other(replicas: Replicas) -> None:
    a, b = replicas("a"), replicas("b")
    keep(a, files(0))
    assert kept(b) == files(0)
    keep(b, files(1), overwrite=True)
    assert kept(a) == files(1)
    a.catalogue.delete(path())
    with pytest.raises(NotFound):
        b.get(path())
    assert listed(a) == listed(b) == []


def test_of_many_who_save_one_name_at_once_one_wins(replicas: Replicas) -> None:
    def save(index: int) -> bool:
        try:
            keep(replicas("ab"[index % 2]), files(index), name)
        except AlreadyExists:
            return False
        return True

    replicas("a"), replicas("b")
    with ThreadPoolExecutor(8) as beside:
        for round_ in range(3):
            name = f"{PATH}-{round_}"
            won = list(beside.map(save, range(8)))
            assert won.count(True) == 1
            assert kept(replicas("a"), name) == kept(replicas("b"), name)
            assert kept(replicas("a"), name) == files(won.index(True))
    assert listed(replicas("a")) == listed(replicas("b"))


def test_commits_that_wait_at_the_same_time_make_one_entry(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper, count = replicas("a"), 12
    append, may_go, entries = ObjectLog.append, threading.Event(), []

    def slow(self: ObjectLog, position: int, entry: bytes) -> bool:
        entries.append(position)
        assert may_go.wait(60)
        return append(self, position, entry)

    monkeypatch.setattr(ObjectLog, "append", slow)
    with ThreadPoolExecutor(count) as beside:
        saves = [beside.submit(keep, keeper, files(0), f"{PATH}0")]
        while not entries:
            assert not saves[0].done()
        saves += [beside.submit(keep, keeper, files(0), f"{PATH}{n}") for n in range(1, count)]
        transactions = keeper.catalogue._transactions
        while len(transactions._group) < count - 1:  # type: ignore[attr-defined]
            assert not any(save.done() for save in saves)
        may_go.set()
        assert {save.result(60).number for save in saves} == set(range(1, count + 1))
    assert entries == [1, 2]


class Entering:
    """A lock that says who came to it."""

    def __init__(self) -> None:
        self.came = threading.Semaphore(0)
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self.came.release()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_who_waits_for_a_look_that_fails_fails_with_it(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that hangs is waited for once, not by each caller after the other."""
    keeper, count = replicas("a"), 8
    may_fail, looks = threading.Event(), []

    def failing(self: ObjectLog, position: int) -> bytes | None:
        looks.append(position)
        assert may_fail.wait(60)
        raise Unavailable("away", Reason.CHECKPOINT_UNAVAILABLE)

    entering = Entering()
    with monkeypatch.context() as hung, ThreadPoolExecutor(count) as beside:
        hung.setattr(ObjectLog, "read", failing)
        hung.setattr(keeper.catalogue._transactions._looks, "lock", entering)
        calls = [beside.submit(keeper.get, path()) for _ in range(count)]
        for _ in range(count):
            assert entering.came.acquire(timeout=60)
        may_fail.set()
        for call in calls:
            with pytest.raises(Unavailable):
                call.result(60)
    assert len(looks) == 1
    with pytest.raises(NotFound):
        keeper.get(path())


@pytest.mark.parametrize("lost", ["answer", "first answer"])
def test_a_commit_whose_answer_is_lost_is_made_once(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """The client of the store tries again and hears that somebody was faster: itself."""
    append = ObjectLog.append

    def losing(self: ObjectLog, position: int, entry: bytes) -> bool:
        assert append(self, position, entry)
        if lost == "answer":
            raise Unavailable("the answer is lost", Reason.CHECKPOINT_UNAVAILABLE)
        return append(self, position, entry)

    keeper = replicas("a")
    with monkeypatch.context() as losing_answers:
        losing_answers.setattr(ObjectLog, "append", losing)
        keep(keeper, files(0))
    assert listed(keeper) == listed(replicas("b")) == [(1, PATH)]


def test_a_commit_that_comes_after_it_was_given_up_counts_as_anybodys(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A put that takes longer than a server waits: the checkpoint is there, and who grants leases
    and who watches hear of it, or nobody would ever remove it."""
    append, late = ObjectLog.append, []

    def slow(self: ObjectLog, position: int, entry: bytes) -> bool:
        late.append((self, position, entry))
        raise Unavailable("nothing came in time", Reason.CHECKPOINT_UNAVAILABLE)

    keeper, news = replicas("a"), []
    keeper.catalogue.told.append(news.append)
    ephemeral = "tinsmith://run/sampler_weights/ephemeral-1"
    with monkeypatch.context() as slowly:
        slowly.setattr(ObjectLog, "append", slow)
        with pytest.raises(Unavailable):
            keep(keeper, files(0, optimizer=False), ephemeral, ephemeral=True)
    ((log, position, entry),) = late
    assert listed(keeper) == []
    assert append(log, position, entry)
    assert listed(keeper) == [(1, ephemeral)]
    assert [str(made.path) for each in news for made in each.made] == [ephemeral]
    keeper.leases.release(["run"])
    replicas.passes(3 * LEASE_S)
    keeper.reclaim()
    assert listed(keeper) == []


def test_a_position_that_is_taken_by_nothing_is_said(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that says of an object both that it is there and that it is not is not asked for
    ever."""
    keeper = replicas("a")
    keep(keeper, files(0))
    with monkeypatch.context() as broken:
        broken.setattr(shared, "STUCK_S", 0.0)
        broken.setattr(ObjectLog, "append", lambda self, position, entry: False)
        with pytest.raises(Unavailable, match="takes none"):
            keep(keeper, files(1), overwrite=True)
    keep(keeper, files(1), overwrite=True)
    assert kept(keeper) == files(1)


def test_the_fence_of_a_writer_is_in_the_store(replicas: Replicas) -> None:
    keep(replicas("a"), files(0), writer=Writer("cluster", 2))
    with pytest.raises(FailedPrecondition):
        keep(replicas("b"), files(1), PATH + "-late", writer=Writer("cluster", 1))
    assert listed(replicas("b")) == [(1, PATH)]


def test_a_write_that_began_before_its_writer_was_replaced_elsewhere_is_refused(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other server learns of the next writer between the last byte and the commit."""
    a, b = replicas("a"), replicas("b")
    publish = Keeper._publish

    def late(self: Keeper, *args: object) -> object:
        b.catalogue.admit(Writer("cluster", 2))
        return publish(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Keeper, "_publish", late)
    with pytest.raises(FailedPrecondition):
        keep(a, files(0), writer=Writer("cluster", 1))
    assert listed(a) == []


def damage_view(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[4096:8192] = b"\xff" * len(data[4096:8192])
    file.write_bytes(data)


@pytest.mark.parametrize("loss", [Path.unlink, damage_view, lambda file: file.write_bytes(b"")])
@pytest.mark.parametrize("snapshot", [False, True])
def test_a_catalogue_is_rebuilt_from_the_store_alone(
    replicas: Replicas,
    monkeypatch: pytest.MonkeyPatch,
    loss: Callable[[Path], object],
    snapshot: bool,
) -> None:
    """From all entries, or from a snapshot and those after it; numbers go on where they were."""
    keeper = replicas("a")
    for n in range(4):
        keep(keeper, files(n), f"{PATH}{n}", writer=Writer("cluster", 3))
    keeper.catalogue.delete(path(f"{PATH}3"))
    if snapshot:
        monkeypatch.setattr(shared, "SNAPSHOT_ENTRIES", 1)
        monkeypatch.setattr(object_log, "KEPT_S", -10.0)
        keeper.sweep()
        assert list((replicas.objects / "catalogue").iterdir())
        assert not list((replicas.objects / "log").iterdir())
    keep(keeper, files(5), f"{PATH}1", overwrite=True)
    before = listed(keeper)
    replicas.close("a")
    loss(replicas.folder / "a" / VIEW_FILE)
    for name in ("a", "new"):
        assert listed(replicas(name)) == before
        assert kept(replicas(name), f"{PATH}1") == files(5)
        with pytest.raises(FailedPrecondition):
            replicas(name).catalogue.admit(Writer("cluster", 2))
    assert keep(replicas("new"), files(6)).number == before[0][0] + 1


@pytest.mark.parametrize("seed", range(5))
def test_a_snapshot_that_is_written_while_the_catalogue_changes_ends_in_the_same_rows(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """It has some rows from before a change and some from after: names that moved, rows that went.

    Rows, what each owner has, and which bytes are whose are as at the server that made them.
    """
    random = Random(seed)
    a, written = replicas("a"), view.SnapshotWriter._checkpoints
    paths = [
        path(f"tinsmith://run/weights/n{n}").of(owner)
        for owner in ("default", "alice")
        for n in range(4)
    ]

    def change() -> None:
        there = random.choice(paths)
        if random.random() < 0.3:
            with contextlib.suppress(NotFound):
                a.catalogue.delete(there)
        elif random.random() < 0.3:
            with contextlib.suppress(NotFound):
                a.update(there, lambda found: a.set_ttl(found, random.randint(100, 999)))
        else:
            size = random.randint(1, 9)
            blob = Blob("weights", size, "0" * 64, f"{random.getrandbits(64):032x}")
            found = Checkpoint(there, "tiny", LORA, 1, 1.0, None, {}, [blob])
            a.catalogue.add(found, overwrite=True)

    def changing(self: view.SnapshotWriter) -> Iterator[object]:
        for rows in written(self):
            yield rows
            for _ in range(3):
                change()

    for _ in range(20):
        change()
    monkeypatch.setattr(view.SnapshotWriter, "_checkpoints", changing)
    monkeypatch.setattr(view, "ROWS_AT_ONCE", 1)
    monkeypatch.setattr(shared, "SNAPSHOT_ENTRIES", 1)
    a.catalogue.tidy()
    change()
    for table in ("checkpoints", "tallies", "places", "sqlite_sequence"):
        query = f"SELECT * FROM {table} ORDER BY 1, 2"
        have, had = (
            [tuple(row) for row in replicas(name).catalogue._db.execute(query)]
            for name in ("new", "a")
        )
        assert have == had, table


def test_who_was_away_while_the_log_was_cut_does_not_take_its_end_for_the_end(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions after the last that it read are free again, and must not be taken."""
    a, b = replicas("a"), replicas("b")
    keep(a, files(0))
    assert listed(b) == listed(a)
    keep(a, files(1), PATH + "-second")
    monkeypatch.setattr(shared, "SNAPSHOT_ENTRIES", 1)
    monkeypatch.setattr(object_log, "KEPT_S", -10.0)
    a.sweep()
    assert not list((replicas.objects / "log").iterdir())
    replicas.passes(shared.SURE_S + 1)
    with pytest.raises(AlreadyExists):
        keep(b, files(2), PATH + "-second")
    keep(b, files(2), PATH + "-third")
    assert listed(a) == listed(b)
    assert len(listed(a)) == 3


def test_an_entry_that_is_damaged_is_said_and_not_skipped(replicas: Replicas) -> None:
    a, b = replicas("a"), replicas("b")
    keep(a, files(0))
    (_, entry) = sorted((replicas.objects / "log").iterdir())
    entry.write_bytes(entry.read_bytes().replace(b"tiny", b"tony"))
    with pytest.raises(DataLoss, match="entry 1"):
        b.get(path())
    with pytest.raises(CatalogueUnusable, match="entry 1"):
        replicas("c")


def test_another_store_under_the_same_folder_is_another_catalogue(replicas: Replicas) -> None:
    keep(replicas("a"), files(0))
    replicas.close("a")
    replicas.objects = replicas.folder / "others"
    assert listed(replicas("a")) == []


def test_checkpoints_of_a_folder_are_not_hidden_by_a_store(
    replicas: Replicas, tmp_path: Path
) -> None:
    open_keeper(tmp_path / "a", checkpoint_bytes_max=1).close()
    with pytest.raises(StoreUnusable, match="has checkpoints of its own"):
        replicas("a")
