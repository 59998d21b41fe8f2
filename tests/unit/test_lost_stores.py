"""Object stores that lost something behind the back of Checkpoint servers: none goes on as if they
never had it."""

import shutil
from pathlib import Path

import pytest

from checkpoints import PATH, files, keep, kept
from replicas import Replicas, listed
from tinsmithd.checkpoint.catalogue import CatalogueUnusable
from tinsmithd.checkpoint.opening import VIEW_FILE
from tinsmithd.checkpoint.store import StoreUnusable
from tinsmithd.checkpoint.store.object.log import ObjectLog
from tinsmithd.errors import Reason, Unavailable


def test_a_store_that_lost_its_log_is_not_taken_for_an_empty_one(replicas: Replicas) -> None:
    keep(replicas("a"), files(0))
    replicas.close("a")
    (_, entry) = sorted((replicas.objects / "log").iterdir())
    entry.unlink()
    with pytest.raises(CatalogueUnusable, match="ends before entry 1"):
        replicas("a")


def test_a_store_that_was_restored_and_went_on_is_not_taken_for_the_one_before(
    replicas: Replicas, tmp_path: Path
) -> None:
    """A server that has seen what is lost would go on with it, beside others that have not."""
    keep(replicas("a"), files(0))
    copy = shutil.copytree(replicas.objects, tmp_path / "copy")
    keep(replicas("a"), files(1), f"{PATH}-lost")
    replicas.close("a")
    shutil.rmtree(replicas.objects)
    shutil.copytree(copy, replicas.objects)
    with pytest.raises(CatalogueUnusable, match="ends before entry 2"):
        replicas("a")
    keep(replicas("b"), files(2), f"{PATH}-new")
    with pytest.raises(CatalogueUnusable, match="has another entry 2 than"):
        replicas("a")
    (replicas.folder / "a" / VIEW_FILE).unlink()
    assert listed(replicas("a")) == listed(replicas("b"))
    assert kept(replicas("a"), f"{PATH}-new") == files(2)


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (["log"], "no log/0"),
        (["log", "format"], "no format"),
        (["log/00000000000000000000", "log/00000000000000000001"], "no entries 1 to 1"),
        (["log/00000000000000000002"], "no entries 2 to 2"),
    ],
)
def test_a_store_that_lost_objects_is_not_taken_for_what_it_still_has(
    replicas: Replicas, lost: list[str], said: str
) -> None:
    """As by a rule of its bucket that removes what is old: a server without a file of its own would
    find nothing, or less, and remove all blobs that nothing refers to."""
    for index in range(3):
        keep(replicas("a"), files(index), f"{PATH}{index}")
    replicas.close("a")
    for name in lost:
        place = replicas.objects / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    before = replicas.blobs()
    with pytest.raises((CatalogueUnusable, StoreUnusable), match=said):
        replicas("b")
    assert replicas.blobs() == before > 0


def test_a_first_write_that_fails_leaves_a_store_that_can_be_used(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has files, and a log without an entry."""

    def failing(self: ObjectLog, position: int, entry: bytes) -> bool:
        raise Unavailable("away", Reason.CHECKPOINT_UNAVAILABLE)

    with monkeypatch.context() as away:
        away.setattr(ObjectLog, "append", failing)
        with pytest.raises(Unavailable):
            keep(replicas("a"), files(0))
    assert replicas.blobs()
    assert listed(replicas("b")) == []
