"""Rows 36 and 37: clocks that jump, and removals that meet readers."""

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoints import PATH, TimedKeeper, blobs, files, keep, kept
from tinsmithd.checkpoint.export import exported_files, tar_of
from tinsmithd.checkpoint.opening import open_keeper
from tinsmithd.checkpoint.rules import EXPIRY_GRACE_S
from tinsmithd.checkpoint.segments import pieces_from
from tinsmithd.domain import CheckpointPath
from tinsmithd.errors import NotFound, TinsmithError

KEY = CheckpointPath.parse(PATH)
HOUR_S = 3600.0


class Timed(TimedKeeper):
    """One that is swept as time passes."""

    def passes(self, seconds: float) -> None:
        """Time passes as it should, with a sweep each minute."""
        while seconds > 0:
            step = min(60.0, seconds)
            self.wall.now_s += step
            self.monotonic.now_s += step
            self.keeper.sweep()
            seconds -= step

    def lives_for(self, seconds: float) -> bool:
        """Whether the checkpoint is there until so much later, and then not; time passes."""
        self.passes(seconds - 1)
        before = self.found()
        self.passes(1)
        return before and not self.found()

    def found(self, path: str = PATH) -> bool:
        try:
            return kept(self.keeper, path) == files(0)
        except NotFound:
            return False


@pytest.fixture
def timed(tmp_path: Path) -> Iterator[Timed]:
    """A keeper on an empty folder."""
    with Timed.opened(tmp_path / "data") as timed:
        yield timed


def test_a_checkpoint_lives_as_long_as_it_was_given(timed: Timed) -> None:
    """Row 36: found until its time, not after, and its bytes go a bounded time later."""
    keep(timed.keeper, files(0), ttl_seconds=7200)
    assert timed.lives_for(7200)
    timed.passes(EXPIRY_GRACE_S - 60)
    assert blobs(timed.folder)
    timed.passes(120)
    assert not blobs(timed.folder)


def test_a_clock_that_is_ahead_for_a_while_deletes_nothing(timed: Timed) -> None:
    """Row 36: an hour ahead for less than the grace: hidden meanwhile, then there again."""
    keep(timed.keeper, files(0), ttl_seconds=1800)
    timed.wall.now_s += HOUR_S
    timed.passes(EXPIRY_GRACE_S - 60)
    assert not timed.found()
    timed.wall.now_s -= HOUR_S
    timed.passes(60)
    assert timed.found()
    timed.wall.now_s += HOUR_S  # what was seen before counts no more
    timed.passes(EXPIRY_GRACE_S - 60)
    timed.wall.now_s -= HOUR_S
    assert timed.found()


def test_a_clock_that_jumps_ahead_expires_nothing_earlier_than_by_its_jump(timed: Timed) -> None:
    """Row 36: an hour ahead for good costs an hour, as the policy says, and not more."""
    keep(timed.keeper, files(0), ttl_seconds=7200)
    timed.wall.now_s += HOUR_S
    assert timed.lives_for(3600)


def test_a_clock_that_jumps_back_deletes_nothing_early(timed: Timed) -> None:
    """Row 36: lives are longer by the jump; order does not depend on clocks."""
    keep(timed.keeper, files(0), ttl_seconds=7200)
    timed.wall.now_s -= HOUR_S
    keep(timed.keeper, files(0), PATH + "-later")
    page, _ = timed.keeper.catalogue.page(model_id="", kind=None, before=None, size=9)
    assert [checkpoint.path.name for checkpoint in page] == ["one-later", "one"]
    assert timed.lives_for(10_800)


def test_a_start_with_a_wrong_clock_deletes_nothing_at_once(timed: Timed) -> None:
    """Rows 8, 36: a machine that comes up with a clock of next year has time to set it."""
    keep(timed.keeper, files(0), ttl_seconds=7200)
    timed.wall.now_s += 365 * 24 * HOUR_S
    for _ in range(3):
        timed.restart()
        timed.passes(EXPIRY_GRACE_S - 60)
    timed.wall.now_s -= 365 * 24 * HOUR_S
    timed.keeper.sweep()
    assert timed.found()


def test_a_life_that_is_prolonged_at_the_last_moment_goes_on(timed: Timed) -> None:
    """Rows 36, 37: the sweep that was about to delete asks once more."""
    keep(timed.keeper, files(0), ttl_seconds=100)
    expired = timed.keeper.catalogue.expired
    timed.passes(99)

    def prolong_meanwhile() -> object:
        numbers = expired()
        timed.wall.now_s -= HOUR_S
        timed.keeper.catalogue.update(KEY, lambda found: timed.keeper.set_ttl(found, None))
        timed.wall.now_s += HOUR_S
        return numbers

    timed.passes(EXPIRY_GRACE_S)
    assert not timed.found()
    timed.keeper.catalogue.expired = prolong_meanwhile  # type: ignore[method-assign]
    timed.passes(60)  # due with this one
    assert timed.found()


def exported(timed: Timed) -> Iterator[bytes]:
    """The archive of the checkpoint, piece by piece as it is read."""
    segments = list(tar_of(timed.keeper.open(KEY, exported_files)[1]))
    return (piece.data for piece in pieces_from(segments, 0))


def test_whatever_removes_a_checkpoint_leaves_its_readers_alone(timed: Timed) -> None:
    """Row 37: delete, overwrite and expiry, each with a sweep, during a read and an export."""
    path, archive = KEY, b""
    for remove in ("delete", "overwrite", "expire"):
        keep(timed.keeper, files(0), ttl_seconds=60, overwrite=True)
        archive = b"".join(exported(timed))
        _, reading = timed.keeper.open(path)
        exporting = exported(timed)
        first = next(exporting)
        if remove == "delete":
            timed.keeper.catalogue.delete(path)
        elif remove == "overwrite":
            keep(timed.keeper, files(1), overwrite=True)
        timed.passes(60 + EXPIRY_GRACE_S)
        timed.passes(60)
        assert {blob.name: b"".join(content) for blob, content in reading} == files(0)
        assert first + b"".join(exporting) == archive
        assert len(blobs(timed.folder)) == (4 if remove == "overwrite" else 0)


def test_readers_writers_and_sweeps_at_once_see_whole_checkpoints(tmp_path: Path) -> None:
    """Row 37, I10: every read is one of the versions that there were, or none. For two seconds, and
    on a slow disk until there were some of either."""
    keeper = open_keeper(tmp_path / "data", checkpoint_bytes_max=1 << 30)
    versions = [files(n, columns=50) for n in range(3)]
    begun_s = time.monotonic()
    failures: list[BaseException] = []
    reads = [0, 0]

    def enough() -> bool:
        took_s = time.monotonic() - begun_s
        return bool(failures) or took_s > 100 or (took_s > 2 and min(reads) > 10)

    def looped(step) -> threading.Thread:
        def run() -> None:
            try:
                while not enough():
                    step()
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def read() -> None:
        try:
            assert kept(keeper) in versions
            reads[0] += 1
        except NotFound:
            reads[1] += 1

    def write() -> None:
        keep(keeper, random.choice(versions), overwrite=True)

    def delete() -> None:
        time.sleep(random.uniform(0, 0.01))
        try:
            keeper.catalogue.delete(KEY)
        except TinsmithError as error:
            assert error.reason == "CHECKPOINT_NOT_FOUND"  # noqa: PT017

    def copy() -> None:
        try:
            keeper.copy(KEY, CheckpointPath.parse(PATH + "-copy"), None)
            assert kept(keeper, PATH + "-copy") in versions
            keeper.catalogue.delete(CheckpointPath.parse(PATH + "-copy"))
        except NotFound:
            pass

    threads = [looped(step) for step in (read, read, write, write, delete, copy, keeper.sweep)]
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert min(reads) > 10, reads
    keeper.close()


def test_a_close_waits_for_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 37: a sweep must not go on removing once the next server may have the folder."""
    keeper = open_keeper(tmp_path / "data", checkpoint_bytes_max=1 << 30)
    keep(keeper, files(0))
    keeper.catalogue.delete(KEY)
    unlink, begun = Path.unlink, threading.Event()

    def slow_unlink(self: Path, missing_ok: bool = False) -> None:
        begun.set()
        time.sleep(0.05)
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", slow_unlink)
    sweep = threading.Thread(target=keeper.sweep)
    sweep.start()
    begun.wait(10)
    keeper.close()
    left = blobs(tmp_path / "data")
    sweep.join()
    assert blobs(tmp_path / "data") == left
    with contextlib.closing(open_keeper(tmp_path / "data", checkpoint_bytes_max=1 << 30)) as after:
        after.sweep()
        assert not blobs(tmp_path / "data")
