"""A deposit that a living process made is there until that process gives it up."""

import fcntl
import os
import threading
from pathlib import Path

import pytest

from tinsmithd import files
from tinsmithd.checkpoint.store.deposits import Deposits
from tinsmithd.files import hold_deposit


def test_a_sweep_between_making_and_holding_takes_nothing_that_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it takes is made anew."""
    deposits, flock, sweeps = Deposits(tmp_path), fcntl.flock, iter([1, 2])

    def late(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_SH and next(sweeps, None):
            deposits.sweep()
        flock(descriptor, operation)

    monkeypatch.setattr(files.fcntl, "flock", late)  # type: ignore[attr-defined]
    path, holder = hold_deposit(tmp_path)
    monkeypatch.undo()
    assert next(sweeps, None) is None
    deposits.sweep()
    assert list(tmp_path.iterdir()) == [path]
    os.close(holder)
    deposits.sweep()
    assert not list(tmp_path.iterdir())


def test_sweeps_without_end_take_nothing_that_is_held(tmp_path: Path) -> None:
    deposits, ends = Deposits(tmp_path), threading.Event()

    def sweep() -> None:
        while not ends.is_set():
            deposits.sweep()

    sweeping = threading.Thread(target=sweep)
    sweeping.start()
    try:
        for _ in range(200):
            path, holder = hold_deposit(tmp_path)
            (path / "weights").write_bytes(b"w")
            os.close(holder)
    finally:
        ends.set()
        sweeping.join()


@pytest.mark.parametrize("step", ["open", "flock"])
def test_nothing_is_left_where_none_can_be_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Neither descriptors nor locks to be had."""

    def refused(*_: object) -> None:
        raise OSError(37, "none available")

    with monkeypatch.context() as patch:
        patch.setattr(os if step == "open" else fcntl, step, refused)
        with pytest.raises(OSError, match="none available"):
            hold_deposit(tmp_path)
    assert not list(tmp_path.iterdir())
