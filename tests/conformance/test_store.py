"""What every store of checkpoint bytes keeps; `STORES` has the implementers."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tinsmithd.checkpoint.store import Blob, Staging, Store, StoreBusy
from tinsmithd.checkpoint.store.directory import DirectoryStore
from tinsmithd.errors import DataLoss, InvalidArgument, Reason

BYTES_MAX = 1 << 20
FILES = {"weights": b"w" * 3000, "settings": b"{}", "empty": b""}


@dataclass(frozen=True)
class Implementer:
    """A store, and how its bytes go bad.

    Attributes:
        open: Opens the store of a folder.
        damage: Changes one byte of a blob behind the store's back.
    """

    open: Callable[[Path], Store]
    damage: Callable[[Path, Blob], None]


def _damage_file(folder: Path, blob: Blob) -> None:
    (place,) = folder.rglob(blob.sha256)
    place.write_bytes(b"x" + place.read_bytes()[1:])


STORES = {"directory": Implementer(DirectoryStore, _damage_file)}


@pytest.fixture(params=STORES)
def implementer(request: pytest.FixtureRequest) -> Implementer:
    return STORES[request.param]


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


def test_nothing_is_there_before_it_is_published(store: Store) -> None:
    staging = staged(store, FILES)
    for blob in staging.finish():
        with pytest.raises(DataLoss) as caught:
            store.read(blob)
        assert caught.value.reason is Reason.CHECKPOINT_CORRUPT
    assert store.empty
    staging.discard()
    assert store.empty


def test_what_a_process_staged_and_left_does_not_count(
    implementer: Implementer, folder: Path
) -> None:
    with contextlib.closing(implementer.open(folder)) as store:
        staged(store, FILES).finish()
    with contextlib.closing(implementer.open(folder)) as store:
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


def test_a_content_that_is_there_already_stays(store: Store) -> None:
    blobs = published(store)
    assert published(store) == blobs
    assert read(store, blobs["weights"]) == FILES["weights"]
    assert store.sweep({blob.sha256 for blob in blobs.values()}) == 0


def test_a_damaged_blob_never_ends_normally_and_is_healed_by_its_content(
    implementer: Implementer, store: Store, folder: Path
) -> None:
    blob = published(store)["weights"]
    implementer.damage(folder, blob)
    with pytest.raises(DataLoss) as caught:
        read(store, blob)
    assert caught.value.reason is Reason.CHECKPOINT_CORRUPT
    published(store)
    assert read(store, blob) == FILES["weights"]


def test_a_sweep_removes_what_is_not_kept(store: Store) -> None:
    blobs = published(store)
    assert store.sweep({blobs["settings"].sha256}) == 2
    assert read(store, blobs["settings"]) == FILES["settings"]
    with pytest.raises(DataLoss):
        store.read(blobs["weights"])
    assert store.sweep(()) == 1
    assert store.empty


def test_a_reader_goes_on_after_a_sweep(store: Store) -> None:
    reading = store.read(published(store)["weights"])
    store.sweep(())
    assert b"".join(reading) == FILES["weights"]


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
        store.sweep(())
        with pytest.raises(DataLoss):
            store.sync(list(blobs.values()))
