"""What every log that Checkpoint servers share keeps; `PLACES` has the stores that have one."""

import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from attack.harness import rss_bytes
from object_stores import SeaweedFS
from store_proxy import StoreProxy
from tinsmithd.checkpoint.opening import ObjectPlace, open_keeper
from tinsmithd.checkpoint.store import Log, Snapshot, StoreUnusable, whole
from tinsmithd.checkpoint.store.object import log as object_log
from tinsmithd.checkpoint.store.object.bucket import PART_BYTES, PIECE_BYTES, READERS, Bucket
from tinsmithd.checkpoint.store.object.log import ObjectLog
from tinsmithd.errors import DataLoss, Reason, TinsmithError, Unavailable
from tinsmithd.formats import FormatUnknown


def _folder(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectPlace:
    return ObjectPlace(f"file://{tmp_path}/objects")


def _s3(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectPlace:
    seaweedfs: SeaweedFS = request.getfixturevalue("seaweedfs")
    return seaweedfs.place()


PLACES: dict[str, Callable[[pytest.FixtureRequest, Path], ObjectPlace]] = {
    "folder": _folder,
    "s3": _s3,
}


@pytest.fixture(params=PLACES)
def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> Bucket:
    place = PLACES[request.param](request, tmp_path)
    return Bucket(place.url, place.options)


@pytest.fixture
def log(bucket: Bucket) -> Log:
    return ObjectLog(bucket)


def test_a_position_is_decided_once(log: Log) -> None:
    assert log.read(1) is None
    assert not log.has(1)
    assert log.append(1, b"first")
    assert not log.append(1, b"second")
    assert log.append(2, b"second")
    assert [log.read(position) for position in (1, 2, 3)] == [b"first", b"second", None]
    assert log.has(2)


def test_what_follows_a_position_is_found(log: Log) -> None:
    assert log.first_after(0) is None
    for position in (1, 2, 12):
        log.append(position, b"entry")
    assert [log.first_after(position) for position in (0, 1, 2, 11, 12)] == [1, 2, 12, 12, None]


def test_one_of_many_who_want_a_position_has_it(log: Log, bucket: Bucket) -> None:
    others = [log, *(ObjectLog(bucket) for _ in range(7))]
    with ThreadPoolExecutor(len(others)) as beside:
        for position in range(1, 4):
            puts = [
                beside.submit(other.append, position, b"%d" % index)
                for index, other in enumerate(others)
            ]
            won = [put.result() for put in puts]
            assert won.count(True) == 1
            assert log.read(position) == b"%d" % won.index(True)


def test_all_who_open_a_log_have_the_same(log: Log, bucket: Bucket) -> None:
    with ThreadPoolExecutor(4) as beside:
        found = {other.identity for other in beside.map(lambda _: ObjectLog(bucket), range(4))}
    assert found == {log.identity}


def test_the_snapshot_of_the_highest_position_is_the_newest(log: Log) -> None:
    assert log.newest_snapshot() is None
    content = [b"x" * 1000, b"y" * (1 << 20)]
    log.write_snapshot(Snapshot(9, 50), content)
    log.write_snapshot(Snapshot(10, 60), content)
    log.write_snapshot(Snapshot(2, 20), [])
    newest = log.newest_snapshot()
    assert newest == Snapshot(10, 60, len(b"".join(content)))
    assert b"".join(log.read_snapshot(newest)) == b"".join(content)


def test_only_what_an_old_snapshot_stands_for_goes(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    for position in range(1, 6):
        assert log.append(position, b"entry")
    assert log.trim() == 0
    log.write_snapshot(Snapshot(2, 10), [b"older"])
    log.write_snapshot(Snapshot(3, 15), [b"newer"])
    assert log.trim() == 0
    monkeypatch.setattr(object_log, "KEPT_S", -10.0)
    assert log.trim() == 5  # what the log began with, too
    assert [log.read(position) for position in range(1, 6)] == [None] * 3 + [b"entry"] * 2
    assert log.newest_snapshot() == Snapshot(3, 15, 5)
    assert log.trim() == 0


def test_an_object_is_read_in_pieces_to_its_last_byte(bucket: Bucket) -> None:
    content = bytes(range(256)) * (3 * PART_BYTES // 512) + b"end"
    upload = bucket.upload("large")
    upload.write(content)
    upload.close()
    pieces = list(bucket.read("large", len(content)))
    assert max(map(len, pieces)) == PIECE_BYTES
    assert b"".join(pieces) == content
    with pytest.raises(DataLoss, match="bytes, not"):
        list(bucket.read("large", len(content) + 1))


def test_of_many_who_read_few_are_read_ahead(tmp_path: Path) -> None:
    """Who reads slowly keeps two parts of eight megabytes each then, and a thousand may read."""
    bucket = Bucket(f"file://{tmp_path}/objects")
    size = 2 * PART_BYTES
    upload = bucket.upload("large")
    upload.write(bytes(size))
    upload.close()
    begun = [bucket.read("large", size) for _ in range(READERS + 40)]
    before = rss_bytes(os.getpid())
    for reading in begun:
        assert len(next(reading)) == PIECE_BYTES
    held = READERS * 2 * PART_BYTES + 40 * PIECE_BYTES
    assert rss_bytes(os.getpid()) - before < 1.1 * held
    for reading in begun:
        reading.close()  # type: ignore[attr-defined]
    assert b"".join(bucket.read("large", size)) == bytes(size)  # ahead again


def test_who_stops_to_read_does_not_wait_for_what_is_coming(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store may hang by then."""
    part, may_come = Bucket._part, threading.Event()

    def hanging(self: Bucket, key: str, start: int, *sizes: int) -> bytes:
        assert not start or may_come.wait(60)
        return part(self, key, start, *sizes)

    bucket.put("two parts", b"x" * (PART_BYTES + 1))
    monkeypatch.setattr(Bucket, "_part", hanging)
    reading = bucket.read("two parts", PART_BYTES + 1)
    assert next(reading)
    reading.close()  # type: ignore[attr-defined]
    assert not may_come.is_set()
    may_come.set()


def test_a_log_of_a_later_version_is_refused(bucket: Bucket) -> None:
    bucket.put(object_log.FORMAT_KEY, b'{"format": 2, "identity": "x"}')
    with pytest.raises(FormatUnknown, match="format 2"):
        ObjectLog(bucket)


def test_a_prefix_that_somebody_else_uses_is_refused(bucket: Bucket) -> None:
    bucket.put(object_log.FORMAT_KEY, b"PNG")
    with pytest.raises(StoreUnusable, match="none of this service"):
        ObjectLog(bucket)


def test_a_store_without_conditional_puts_is_refused(seaweedfs: SeaweedFS, tmp_path: Path) -> None:
    """Two servers would overwrite each other's entries there, and each save would look well."""
    with StoreProxy(seaweedfs.endpoint) as proxy:
        proxy.lost.add("if-none-match")
        place = seaweedfs.unsigned(proxy.endpoint)
        with pytest.raises(StoreUnusable, match="If-None-Match"):
            open_keeper(tmp_path / "data", checkpoint_bytes_max=1, place=place)
        proxy.lost.clear()
        open_keeper(tmp_path / "data", checkpoint_bytes_max=1, place=place).close()


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (403, "ExpiredToken", Reason.CHECKPOINT_UNAVAILABLE),
        (403, "RequestTimeTooSkewed", Reason.CHECKPOINT_UNAVAILABLE),
        (507, "InsufficientStorage", Reason.STORAGE_FULL),
    ],
)
def test_what_a_store_says_is_told_to_who_operates_it(
    seaweedfs: SeaweedFS, status: int, code: str, reason: Reason
) -> None:
    """Of an upload in parts, too, whether it begins or goes on."""
    with StoreProxy(seaweedfs.endpoint) as proxy:
        place = seaweedfs.unsigned(proxy.endpoint)
        bucket = Bucket(place.url, place.options)
        upload = bucket.upload("large")
        upload.write(bytes(PART_BYTES + 1))
        proxy.says = lambda method, path: (status, code)
        calls: list[Callable[[], object]] = [
            lambda: bucket.put("small", b"x"),
            lambda: bucket.get("small"),
            lambda: bucket.has("small"),
            lambda: next(bucket.pages("x")),
            upload.close,
        ]
        for call in calls:
            with pytest.raises(TinsmithError) as caught:
                call()
            assert caught.value.reason is reason
            if reason is not Reason.STORAGE_FULL:
                assert str(status) in whole(caught.value)


def test_who_may_not_is_unavailable_and_no_secret_is_said(seaweedfs: SeaweedFS) -> None:
    options = {**seaweedfs.options, "secret_access_key": "wrong-secret"}
    with pytest.raises(Unavailable) as caught:
        ObjectLog(Bucket(seaweedfs.place().url, options))
    assert "wrong-secret" not in whole(caught.value)
    assert options["access_key_id"] not in whole(caught.value)


def test_a_store_that_is_away_is_unavailable() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        keys = {"access_key_id": "a", "secret_access_key": "b"}
        with pytest.raises(Unavailable) as caught:
            ObjectLog(Bucket("s3://bucket/x", {"endpoint": endpoint, **keys}))
    assert "bucket" not in caught.value.message  # callers need not know where the store is
    assert f"{endpoint}/bucket/x/format" in whole(caught.value)


@pytest.mark.parametrize(
    "url", ["", "nope://bucket/x", "http://127.0.0.1/x", "s3:bucket", "/folder", "memory:///"]
)
def test_what_is_no_store_is_refused(url: str) -> None:
    with pytest.raises(StoreUnusable, match="store_url"):
        Bucket(url)


def test_an_option_that_is_none_is_refused() -> None:
    with pytest.raises(StoreUnusable, match="bogus"):
        Bucket("s3://bucket/x", {"bogus": "1"})
