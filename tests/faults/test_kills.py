"""Users' scripts without any handling of errors, and kill -9 all around them."""

from pathlib import Path

import pytest

from faults.harness import Harness, Plan


@pytest.mark.timeout(300)
def test_scripts_see_and_save_what_they_would_have_if_nothing_had_been_killed(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Eight kills at chosen moments, of ranks and servers, also in the middle of what is under way
    and of recoveries: no acknowledged step is lost, none is done twice, every value and the saved
    state are the undisturbed run's (rows 1 to 5, 8, 9). `make faults` does the same for hours."""
    plan = Plan(tiny_model, tmp_path, kills=8, seed=20, steps=50)
    report = Harness(plan).run()
    assert report.differences == []
    assert (report.lost, report.twice) == (0, 0)
    assert report.steps == report.scripts * plan.steps
    assert report.kills >= plan.kills
