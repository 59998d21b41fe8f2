"""What every store of checkpoint bytes keeps; `STORES` has the implementers."""

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from checkpoints import Clock, leave
from object_stores import SeaweedFS
from store_proxy import StoreProxy
from tinsmithd.checkpoint.opening import ObjectPlace
from tinsmithd.checkpoint.store import Blob, Staging, Store, StoreBusy
from tinsmithd.checkpoint.store.directory import DirectoryStore
from tinsmithd.checkpoint.store.object import bucket as bucket_module
from tinsmithd.checkpoint.store.object import store as object_store
from tinsmithd.checkpoint.store.object.bucket import Bucket
from tinsmithd.checkpoint.store.object.store import READ_BYTES, ObjectStore
from tinsmithd.errors import DataLoss, InvalidArgument, Reason, Unavailable

BYTES_MAX = 1 << 20
GRACE_S = 100.0
FILES = {"weights": b"w" * 3000, "settings": b"{}", "empty": b""}


@dataclass(frozen=True)
class Implementer:
    """A store, and how its bytes go bad.

    Attributes:
        open: Opens the store of a folder.
        damage: Changes one byte of a blob behind the store's back.
        clock: What counts how long a blob is unused.
    """

    open: Callable[[Path], Store]
    damage: Callable[[Path, Blob], None]
    clock: Clock

    def sweep(self, store: Store, kept: Collection[str]) -> int:
        """Let a store remove all but some blobs; of one that waits with that it is awaited."""

        def unused(places: Collection[str]) -> list[str]:
            return [place for place in places if place not in kept]

        removed = store.sweep(unused)
        for _ in range(2 if store.shared else 0):
            self.clock.now_s += GRACE_S
            removed += store.sweep(unused)
        return removed


def _damage_file(folder: Path, blob: Blob) -> None:
    (place,) = folder.rglob(blob.place)
    place.write_bytes(b"x" + place.read_bytes()[1:])


def _directory(request: pytest.FixtureRequest) -> Implementer:
    return Implementer(DirectoryStore, _damage_file, Clock())


def _folder(request: pytest.FixtureRequest) -> Implementer:
    return _objects(lambda folder: ObjectPlace(f"file://{folder.parent}/objects"))


def _s3(request: pytest.FixtureRequest) -> Implementer:
    seaweedfs: SeaweedFS = request.getfixturevalue("seaweedfs")
    place = seaweedfs.place()
    return _objects(lambda folder: place)


def _objects(place: Callable[[Path], ObjectPlace]) -> Implementer:
    clock = Clock()

    def bucket(folder: Path) -> Bucket:
        return Bucket(place(folder).url, place(folder).options)

    def opened(folder: Path) -> Store:
        return ObjectStore(bucket(folder), folder, grace_s=GRACE_S, monotonic=clock)

    def damage(folder: Path, blob: Blob) -> None:
        key = f"blobs/{blob.key[:2]}/{blob.key}"
        content = bucket(folder).get(key)
        assert content
        bucket(folder).put(key, b"x" + content[1:])

    return Implementer(opened, damage, clock)


STORES = {"directory": _directory, "folder": _folder, "s3": _s3}


@pytest.fixture(params=STORES)
def implementer(request: pytest.FixtureRequest) -> Implementer:
    return STORES[request.param](request)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def store(implementer: Implementer, folder: Path) -> Iterator[Store]:
    with contextlib.closing(implementer.open(folder)) as opened:
        yield opened


def staged(store: Store, files: Mapping[str, bytes], piece: int = 1000) -> Staging:
    staging = store.stage(BYTES_MAX)
    for name, data in files.items():
        for offset in range(0, max(len(data), 1), piece):
            staging.append(name, offset, data[offset : offset + piece])
    return staging


def published(
    store: Store, files: Mapping[str, bytes] = FILES, *, durable: bool = True
) -> dict[str, Blob]:
    staging = staged(store, files)
    blobs = {blob.name: blob for blob in staging.finish(durable=durable)}
    staging.publish(durable=durable)
    staging.discard()
    return blobs


def read(store: Store, blob: Blob) -> bytes:
    return b"".join(store.read(blob))


def gone(store: Store, blob: Blob) -> None:
    with pytest.raises(DataLoss) as caught:
        read(store, blob)
    assert caught.value.reason is Reason.CHECKPOINT_CORRUPT


def test_what_was_published_is_read_back_also_by_the_next_process(
    implementer: Implementer, folder: Path
) -> None:
    with contextlib.closing(implementer.open(folder)) as store:
        assert store.empty
        blobs = published(store)
        assert not store.empty
        assert {name: read(store, blob) for name, blob in blobs.items()} == FILES
    with contextlib.closing(implementer.open(folder)) as store:
        store.probe()
        assert {name: read(store, blob) for name, blob in blobs.items()} == FILES


def test_finish_says_what_came_sorted_by_name(store: Store) -> None:
    assert staged(store, FILES).finish() == [
        Blob(name, len(FILES[name]), hashlib.sha256(FILES[name]).hexdigest())
        for name in sorted(FILES)
    ]


def test_a_finished_file_can_be_read_and_sought_before_it_is_published(store: Store) -> None:
    staging = staged(store, FILES)
    staging.finish()
    with staging.open("weights") as file:
        file.seek(2999)
        assert file.read() == b"w"


def test_what_was_left_to_be_taken_is_what_is_read(store: Store, folder: Path) -> None:
    """Files that are many pieces long, too."""
    left = {"weights": os.urandom(5 * READ_BYTES // 2), "settings": b"{}"}
    staging = store.stage(1 << 30)
    deposit = leave(folder, left, held=False)
    for name, data in left.items():
        assert staging.take(deposit, name) == len(data)
    blobs = staging.finish()
    staging.publish()
    staging.discard()
    assert {blob.name: read(store, blob) for blob in blobs} == left


def test_nothing_is_there_of_what_was_not_published(store: Store) -> None:
    """Where blobs are found by what they hold, also before it is known that they will not be."""
    staging = staged(store, FILES)
    finished = [blob for blob in staging.finish() if blob.size_bytes]
    if not store.shared:
        for blob in finished:
            gone(store, blob)
        assert store.empty
    staging.discard()
    for blob in finished:
        gone(store, blob)
    assert store.empty


def test_what_a_process_staged_and_left_does_not_count(
    implementer: Implementer, folder: Path
) -> None:
    with contextlib.closing(implementer.open(folder)) as store:
        staged(store, FILES).finish()
    with contextlib.closing(implementer.open(folder)) as store:
        implementer.sweep(store, ())
        assert store.empty
        assert len(published(store)) == len(FILES)


@pytest.mark.parametrize(
    ("name", "offset"), [("weights", 2999), ("weights", 3001), ("new", 1), ("settings", 2)]
)
def test_bytes_that_do_not_follow_are_refused(store: Store, name: str, offset: int) -> None:
    """A gap, a repeat, a file that begins late, and one that goes on after another began."""
    staging = staged(store, {"settings": b"{}", "weights": b"w" * 3000})
    with pytest.raises(InvalidArgument) as caught:
        staging.append(name, offset, b"more")
    assert caught.value.reason is Reason.MALFORMED_STREAM
    assert caught.value.field == "piece.offset"


def test_more_bytes_than_allowed_are_refused(store: Store) -> None:
    staging = store.stage(10)
    staging.append("a", 0, b"12345")
    staging.append("b", 0, b"12345")
    with pytest.raises(InvalidArgument) as caught:
        staging.append("b", 5, b"6")
    assert caught.value.reason is Reason.LIMIT_EXCEEDED


def test_a_content_that_is_there_already_stays(implementer: Implementer, store: Store) -> None:
    blobs = published(store)
    again = published(store)
    assert again == blobs
    assert read(store, blobs["weights"]) == FILES["weights"]
    both = {blob.place for found in (blobs, again) for blob in found.values()}
    assert implementer.sweep(store, both) == 0


def test_a_damaged_blob_never_ends_normally_and_is_healed_by_its_content(
    implementer: Implementer, store: Store, folder: Path
) -> None:
    blob = published(store)["weights"]
    implementer.damage(folder, blob)
    gone(store, blob)
    again = published(store)["weights"]
    assert read(store, again) == FILES["weights"]
    assert store.shared or read(store, blob) == FILES["weights"]


def test_a_sweep_removes_what_is_not_kept(implementer: Implementer, store: Store) -> None:
    blobs = published(store)
    assert implementer.sweep(store, {blobs["settings"].place}) == 2
    assert read(store, blobs["settings"]) == FILES["settings"]
    gone(store, blobs["weights"])
    assert implementer.sweep(store, ()) == 1
    assert store.empty


def test_a_reader_goes_on_after_a_sweep(store: Store) -> None:
    reading = store.read(published(store)["weights"])
    store.sweep(lambda places: places)
    assert b"".join(reading) == FILES["weights"]


def test_what_is_unused_for_less_than_its_time_stays(
    implementer: Implementer, store: Store
) -> None:
    """Its writer may be about to commit, at another server."""
    if not store.shared:
        pytest.skip("this one does not wait")
    blob = published(store)["weights"]
    store.sweep(lambda places: places)
    implementer.clock.now_s += GRACE_S - 1
    assert store.sweep(lambda places: places) == 0
    assert read(store, blob) == FILES["weights"]


def test_what_is_used_again_before_its_time_stays(implementer: Implementer, store: Store) -> None:
    """A copy may come after a look: a store that waits asks again before it removes."""
    if not store.shared:
        pytest.skip("this one does not wait")
    blob = published(store)["weights"]
    store.sweep(lambda places: places)
    implementer.clock.now_s += GRACE_S
    assert store.sweep(lambda places: ()) == 0
    assert read(store, blob) == FILES["weights"]


def test_a_store_that_hangs_holds_few_writes_in_memory(
    seaweedfs: SeaweedFS, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others are spooled as fast as they come, and uploaded at their end once it answers."""
    monkeypatch.setattr(object_store, "UPLOADS", 1)
    monkeypatch.setattr(bucket_module, "PARTS", 1)
    answers = threading.Event()
    content = os.urandom(3 * bucket_module.PART_BYTES)  # more than may be on its way
    with StoreProxy(seaweedfs.endpoint) as proxy, ThreadPoolExecutor(3) as beside:
        place = seaweedfs.unsigned(proxy.endpoint)
        bucket = Bucket(place.url, place.options)
        with contextlib.closing(ObjectStore(bucket, folder, grace_s=GRACE_S)) as store:
            proxy.holds = lambda method, path: answers if method in ("PUT", "POST") else None
            try:
                first, *others = (store.stage(len(content)) for _ in range(3))
                waits = beside.submit(first.append, "weights", 0, content)
                for staging in others:
                    beside.submit(staging.append, "weights", 0, content).result(60)
                assert not waits.done()
            finally:
                answers.set()
            waits.result(60)
            for staging in (first, *others):
                (blob,) = staging.finish()
                staging.publish()
                staging.discard()
                assert b"".join(store.read(blob)) == content


def test_what_is_committed_too_late_is_refused(implementer: Implementer, store: Store) -> None:
    """By then another server's sweep may have taken it for unused."""
    if not store.shared:
        pytest.skip("nobody else sweeps this one")
    staging = staged(store, FILES)
    staging.finish()
    implementer.clock.now_s += GRACE_S / 2 + 1
    with pytest.raises(Unavailable):
        staging.publish()
    staging.discard()
    assert store.empty


def test_one_process_at_a_time_has_a_store(implementer: Implementer, folder: Path) -> None:
    with contextlib.closing(implementer.open(folder)), pytest.raises(StoreBusy):
        implementer.open(folder)
    implementer.open(folder).close()


def test_what_need_not_be_durable_is_there_all_the_same_and_can_be_made_so(
    implementer: Implementer, folder: Path
) -> None:
    """For this process and the next, unless the power fails; a blob that is gone cannot be."""
    with contextlib.closing(implementer.open(folder)) as store:
        blobs = published(store, durable=False)
        store.sync(list(blobs.values()))
    with contextlib.closing(implementer.open(folder)) as store:
        assert {name: read(store, blob) for name, blob in blobs.items()} == FILES
        implementer.sweep(store, ())
        if not store.shared:  # where all is durable nothing is looked for
            with pytest.raises(DataLoss):
                store.sync(list(blobs.values()))
