"""Several keepers over one object store: what is held, what times to live do, when bytes go."""

import pytest

from checkpoints import LEASE_S, PATH, files, keep, kept
from replicas import GRACE_S, Replicas, listed, path
from tinsmithd.checkpoint.rules import EXPIRY_GRACE_S, HOLD_LEASES
from tinsmithd.errors import (
    AlreadyExists,
)

EPHEMERAL = "tinsmith://run/sampler_weights/ephemeral-"


# --- leases and times to live -----------------------------------------------------------------


def test_what_is_held_at_one_is_not_reclaimed_by_another(replicas: Replicas) -> None:
    a, b = replicas("a"), replicas("b")
    replicas.passes(HOLD_LEASES * LEASE_S + 1)  # nobody has to be careful after a start any more
    first, second = EPHEMERAL + "1", EPHEMERAL + "2"
    for index, name in enumerate((first, second)):
        keep(a, files(index, optimizer=False), name, ephemeral=True)
    for _ in range(20):
        replicas.passes(LEASE_S / 3)
        assert b.renew([(path(first), "mine")]) == []
        a.reclaim()
        b.reclaim()
        assert len(listed(a)) == 2
    b.leases.end([(path(first), "mine")])
    b.reclaim()
    assert [name for _, name in listed(a)] == [second]


def test_what_only_a_server_that_died_held_is_reclaimed_soon(replicas: Replicas) -> None:
    a, b = replicas("a"), replicas("b")
    for index in (1, 2):
        keep(a, files(index, optimizer=False), f"{EPHEMERAL}{index}", ephemeral=True)
    a.get(path(EPHEMERAL + "1"), "mine")
    replicas.close("a")
    b.catalogue.refresh()
    b.reclaim()
    assert len(listed(b)) == 2
    replicas.passes(HOLD_LEASES * LEASE_S + 1)
    b.reclaim()
    assert [name for _, name in listed(b)] == [EPHEMERAL + "2"]


def test_one_is_asked_for_while_another_reclaims_it(replicas: Replicas) -> None:
    """Either it is there and stays, or it is gone: never found and then removed."""
    a, b = replicas("a"), replicas("b")
    for index in (1, 2):
        keep(a, files(index, optimizer=False), f"{EPHEMERAL}{index}", ephemeral=True)
    b.catalogue.refresh()
    replicas.passes(HOLD_LEASES * LEASE_S + 1)
    b.get(path(EPHEMERAL + "1"), "mine")
    a.reclaim()  # it has not heard of that lease when it begins
    assert len(listed(a)) == 2


def test_a_server_whose_clock_is_ahead_removes_nothing_early(replicas: Replicas) -> None:
    """By its own clock a checkpoint is over; its entry goes only when that stays so."""
    a = replicas("a")
    keep(a, files(0), ttl_seconds=1000)
    replicas.wall.now_s += 2000
    b = replicas("b")
    b.sweep()
    replicas.wall.now_s -= 2000
    replicas.monotonic.now_s += EXPIRY_GRACE_S + 1
    b.sweep()
    assert kept(a) == files(0)


# --- bytes ------------------------------------------------------------------------------------


def test_bytes_go_a_while_after_their_last_checkpoint_and_copies_keep_them(
    replicas: Replicas,
) -> None:
    a, b = replicas("a"), replicas("b")
    keep(a, files(0))
    b.copy(path(), path(PATH + "-copy"), None)
    assert replicas.blobs() == 4
    a.catalogue.delete(path())
    for _ in range(3):
        b.sweep()
        replicas.passes(GRACE_S)
    assert kept(a, PATH + "-copy") == files(0)
    a.catalogue.delete(path(PATH + "-copy"))
    b.sweep()
    replicas.passes(GRACE_S - 1)
    b.sweep()
    assert replicas.blobs() == 4
    replicas.passes(1)
    b.sweep()
    assert replicas.blobs() == 0


def test_a_reader_goes_on_after_the_checkpoint_is_deleted_elsewhere(replicas: Replicas) -> None:
    a, b = replicas("a"), replicas("b")
    keep(a, files(0))
    _, opened = b.open(path())
    a.catalogue.delete(path())
    a.sweep()
    assert {blob.name: b"".join(content) for blob, content in opened} == files(0)


def test_what_went_is_not_remembered_for_ever(replicas: Replicas) -> None:
    """A server of an object store looks for unused bytes there."""
    a = replicas("a")
    for seed in range(3):
        keep(a, files(seed), overwrite=True)
    with pytest.raises(AlreadyExists):
        keep(a, files(4))
    a.sweep()
    assert not a.catalogue.references._dropped
    assert a._collector._suspects == set()


def test_a_refused_save_leaves_nothing_behind(replicas: Replicas) -> None:
    a = replicas("a")
    keep(a, files(0))
    with pytest.raises(AlreadyExists):
        keep(replicas("b"), files(1))
    assert replicas.blobs() == 4
    assert kept(a) == files(0)
