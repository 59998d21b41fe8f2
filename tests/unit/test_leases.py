"""Which ephemeral checkpoints stay, for how long, and what their bytes do."""

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from checkpoints import LEASE_S, TimedKeeper, blobs, files, keep, kept
from tinsmithd.checkpoint.catalogue import Writer
from tinsmithd.checkpoint.rules import EXPIRY_GRACE_S, Keeper
from tinsmithd.domain import CheckpointPath
from tinsmithd.errors import FailedPrecondition, NotFound, Reason, Unavailable
from tinsmithd.training.models import Releases
from waiting import until

TTL_S = 86_400
MINUTE_S = 60.0
WRITER = Writer("cluster", 1)


class Timed(TimedKeeper):
    """One that a training loop writes to, and clients hold checkpoints of."""

    def save(self, seed: int, model_id: str = "run", writer: Writer = WRITER, **header: Any) -> str:
        """A training loop saves its weights of this round."""
        path = f"tinsmith://{model_id}/sampler_weights/ephemeral-{seed:016x}"
        content = files(seed, optimizer=False)
        keep(self.keeper, content, path, ttl_seconds=TTL_S, writer=writer, ephemeral=True, **header)
        return path

    def passes(self, seconds: float, *held: str) -> None:
        """Time passes, with a client that holds some paths, and the sweeps of the server."""
        end_s = self.monotonic.now_s + seconds
        while self.monotonic.now_s < end_s:
            step_s = min(
                LEASE_S / 3 if seconds < 3600 or held else MINUTE_S, end_s - self.monotonic.now_s
            )
            self.wall.now_s += step_s
            self.monotonic.now_s += step_s
            self.keeper.renew([(CheckpointPath.parse(path), "") for path in held])
            self.keeper.reclaim()
            self.keeper.sweep()

    def there(self, *paths: str) -> list[str]:
        """Those that can be found, without using them."""
        found, _ = self.keeper.catalogue.page(model_id="", kind=None, before=None, size=1000)
        names = {str(checkpoint.path) for checkpoint in found}
        return [path for path in paths if path in names]


@pytest.fixture
def timed(tmp_path: Path) -> Iterator[Timed]:
    """A keeper on an empty folder."""
    with Timed.opened(tmp_path / "data") as timed:
        yield timed


def test_ephemeral_weights_live_while_held_or_while_the_newest_of_their_model(timed: Timed) -> None:
    """And then they are reclaimed within a minute, bytes and all."""
    first, second = timed.save(1), timed.save(2)
    timed.passes(10 * MINUTE_S, first)
    assert timed.there(first, second) == [first, second]
    third = timed.save(3)
    timed.passes(MINUTE_S, first)
    assert timed.there(first, second, third) == [first, third]
    timed.passes(MINUTE_S)
    assert timed.there(first, second, third) == [third]
    only = timed.keeper.catalogue.get(CheckpointPath.parse(third)).files
    assert sorted(blob.name for blob in blobs(timed.folder)) == sorted(b.sha256 for b in only)


def test_the_newest_of_a_model_stays_until_it_was_unused_for_its_time_to_live(timed: Timed) -> None:
    """Using it, in whatever way, begins that time anew."""
    path = timed.save(1)
    for _ in range(4):
        timed.passes(TTL_S - 3600)
        assert kept(timed.keeper, path)
    timed.passes(TTL_S, path)  # held all the time
    timed.passes(0.85 * TTL_S)
    assert timed.there(path)
    timed.passes(0.2 * TTL_S + EXPIRY_GRACE_S)
    assert not timed.there(path)
    assert not blobs(timed.folder)


def test_a_named_checkpoint_is_never_reclaimed_for_a_newer_one(timed: Timed) -> None:
    """Neither one that was given a life of its own, nor a copy."""
    named = "tinsmith://run/sampler_weights/best"
    keep(timed.keeper, files(7, optimizer=False), named)
    given, copied = timed.save(1), timed.save(2)
    key = CheckpointPath.parse(given)
    timed.keeper.update(key, lambda found: timed.keeper.set_ttl(found, None))
    copy = "tinsmith://run/sampler_weights/copy"
    timed.keeper.copy(CheckpointPath.parse(copied), CheckpointPath.parse(copy), None)
    newest = timed.save(3)
    timed.passes(10 * MINUTE_S)
    assert timed.there(named, given, copied, copy, newest) == [named, given, copy, newest]
    assert kept(timed.keeper, copy) == files(2, optimizer=False)


def test_weights_of_a_deleted_model_go_once_nobody_holds_them(timed: Timed) -> None:
    """Whoever samples from them goes on."""
    path, other = timed.save(1), timed.save(2, "other")
    assert timed.keeper.release(["run"], WRITER) == ["other"]
    timed.passes(10 * MINUTE_S, path)
    assert timed.there(path, other) == [path, other]
    timed.passes(MINUTE_S)
    assert timed.there(path, other) == [other]


def test_leases_do_not_depend_on_the_wall_clock(timed: Timed) -> None:
    """A jump reclaims nothing that is held, in either direction."""
    first, second = timed.save(1), timed.save(2)
    for jump_s in (10 * TTL_S, -20 * TTL_S):
        timed.wall.now_s += jump_s
        timed.passes(2 * EXPIRY_GRACE_S, first, second)
        assert kept(timed.keeper, first)
        assert kept(timed.keeper, second)


def test_a_restart_grants_leases_anew(timed: Timed) -> None:
    """For one lease: holders come back in time, and what nobody holds goes as before."""
    first, second = timed.save(1), timed.save(2)
    timed.passes(LEASE_S - 1)
    timed.restart()
    timed.passes(LEASE_S - 1)
    assert timed.there(first, second) == [first, second]
    timed.passes(MINUTE_S, second)
    assert timed.there(first, second) == [second]
    assert timed.keeper.release([], WRITER) == ["run"]


def test_a_reader_in_the_middle_is_not_cut(timed: Timed) -> None:
    """What was opened is read to its end, whatever is reclaimed meanwhile."""
    path = timed.save(1)
    _, opened = timed.keeper.open(CheckpointPath.parse(path))
    timed.save(2)
    timed.passes(10 * MINUTE_S)
    assert not timed.there(path)
    content = {blob.name: b"".join(data) for blob, data in opened}
    assert content == files(1, optimizer=False)


def test_who_comes_too_late_hears_what_happened(timed: Timed) -> None:
    """NOT_FOUND that says why, and a renewal that names the path."""
    path = timed.save(1)
    timed.save(2)
    timed.passes(MINUTE_S)
    key = CheckpointPath.parse(path)
    assert timed.keeper.renew([(key, "")]) == [key]
    with pytest.raises(NotFound, match="reclaimed when no client holds them") as refusal:
        timed.keeper.open(key)
    assert refusal.value.reason is Reason.CHECKPOINT_NOT_FOUND


def test_a_deleted_newest_one_does_not_take_the_one_before_along(timed: Timed) -> None:
    """It is the newest then."""
    first, second = timed.save(1), timed.save(2)
    timed.keeper.catalogue.delete(CheckpointPath.parse(second))
    timed.passes(10 * MINUTE_S)
    assert timed.there(first, second) == [first]


def test_a_replaced_writer_releases_nothing(timed: Timed) -> None:
    """What it knows of models is old."""
    path = timed.save(1, writer=Writer("cluster", 2))
    with pytest.raises(FailedPrecondition) as refusal:
        timed.keeper.release(["run"], WRITER)
    assert refusal.value.reason is Reason.STALE_EPOCH
    timed.passes(10 * MINUTE_S)
    assert timed.there(path)


def test_a_lease_that_is_given_back_ends_alone(timed: Timed) -> None:
    """Others on the same weights last as long as they would have, with an id or without."""
    path, newest = timed.save(1, lease_id="first"), timed.save(2)
    key, leases = CheckpointPath.parse(path), timed.keeper.leases
    leases.renew(key, "second")
    leases.end([(key, "first"), (key, "unknown"), (CheckpointPath.parse(newest), "")])
    timed.keeper.reclaim()
    assert timed.there(path, newest) == [path, newest]
    timed.save(1, overwrite=True, lease_id="third")  # written again: `second` holds on
    leases.end([(key, "third")])
    timed.save(3)
    timed.keeper.reclaim()
    assert timed.there(path) == [path]
    leases.renew(key)  # somebody without an id looks at it
    leases.end([(key, "second")])
    timed.keeper.reclaim()
    assert timed.there(path) == [path]
    timed.passes(LEASE_S)
    assert timed.there(path) == []


def test_a_lease_beyond_the_limit_can_only_run_out(
    timed: Timed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is as good as any other until then; those that ended make room."""
    monkeypatch.setattr("tinsmithd.checkpoint.rules.leases.LEASES_MAX", 2)
    path, _ = timed.save(1, lease_id="a"), timed.save(2)
    key, leases = CheckpointPath.parse(path), timed.keeper.leases
    for lease_id in ("b", "c", "c", "a"):
        leases.renew(key, lease_id)
    leases.end([(key, lease_id) for lease_id in "abc"])
    timed.passes(LEASE_S - 1)
    assert timed.there(path)
    timed.passes(2)
    assert not timed.there(path)
    path, _ = timed.save(3, lease_id="d"), timed.save(4)
    leases.end([(CheckpointPath.parse(path), "d")])
    timed.keeper.reclaim()
    assert not timed.there(path)


class Server:
    """A Checkpoint server that is away at times."""

    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper
        self.away = False
        self.told = 0

    async def release_models(self, model_ids: Sequence[str]) -> Sequence[str]:
        self.told += 1
        if self.away:
            raise Unavailable("away", Reason.CHECKPOINT_UNAVAILABLE)
        return self.keeper.release(model_ids, WRITER)


async def test_deleted_models_are_released_whoever_was_away_when(
    timed: Timed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Checkpoint server down at a deletion, or the Training server restarted after it."""
    monkeypatch.setattr("tinsmithd.training.models.releases.RETRY_S", 0.01)
    paths = [timed.save(i, f"model{i}") for i in range(3)]
    models = {"model0", "model1", "model2"}
    server = Server(timed.keeper)
    server.away = True
    releases = Releases(server, models.__contains__)
    task = asyncio.create_task(releases.run())
    models.discard("model0")
    releases.deleted("model0")
    await until(lambda: server.told > 2)
    task.cancel()  # the Training server is killed, and another one starts without model1
    models.discard("model1")
    server.away = False
    task = asyncio.create_task(Releases(server, models.__contains__).run())
    await until(lambda: timed.keeper.release([], WRITER) == ["model2"])
    task.cancel()
    timed.passes(2 * MINUTE_S)
    assert timed.there(*paths) == paths[2:]
