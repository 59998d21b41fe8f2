"""Lanes that somebody counts: those at rest are not, and are dropped, whoever looks meanwhile."""

from dataclasses import dataclass

from tinsmithd.training.lane import Census
from tinsmithd.training.lane.census import PURGE_MIN


@dataclass
class Some:
    """A lane, as far as it is counted."""

    pending: int = 0
    recovering: bool = False
    resuming: bool = False


def test_those_at_rest_do_not_count_and_do_not_pile_up() -> None:
    """One that something comes to this moment has nothing to show yet, and stays."""
    census = Census()
    busy, back = Some(pending=2), Some(recovering=True)
    census.stirs("busy", busy)
    census.stirs("back", back)
    for number in range(10 * PURGE_MIN):
        census.stirs(f"rests-{number}", Some())
        assert len(census._stirred) <= PURGE_MIN
    late = Some()
    census.stirs("late", late)
    late.pending = 1
    assert dict(census.active()) == {"busy": busy, "back": back, "late": late}
    busy.pending = 0
    assert list(census.stirred) == [back, late]
    census.gone("late")
    assert list(census.stirred) == [back]


def test_to_look_changes_nothing() -> None:
    """Metrics look from another thread, in between a lane's coming and its first call."""
    census, lane = Census(), Some()
    census.stirs("m", lane)
    assert list(census.stirred) == []
    lane.pending = 1
    assert list(census.stirred) == [lane]
