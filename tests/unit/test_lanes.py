"""Two lanes take stages from a queue: a failure ends both, is shown last; folders have budgets."""

import sys
from pathlib import Path

import pytest

from lanes import __main__ as lanes
from lanes import stages
from lanes.report import lines_of, timings_of

CASES = """<testsuites><testsuite>
<testcase classname="tests.unit.test_a" name="test_one[x]" time="1.5"/>
<testcase classname="tests.unit.test_a" name="test_two" time="0.25"/>
<testcase classname="tests.sim.test_b" name="test_three" time="3.0"/>
<testcase><error message="the run was ended here"/></testcase>
</testsuite></testsuites>"""


def stage(name: str, code: str) -> stages.Stage:
    return stages.Stage(name, (sys.executable, "-c", code))


def until_there(file: str) -> str:
    """Code that waits until another stage has made a file."""
    return f"import os, time\nwhile not os.path.exists({file!r}): time.sleep(0.01)\n"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_failure_ends_both_lanes_and_comes_last(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """The other lane's stage is stopped, and no later one starts."""
    slow = stage(
        "slow", "import time; print('begun', flush=True); open('slow', 'w'); time.sleep(600)"
    )
    failing = stage("failing", until_there("slow") + "print('why'); raise SystemExit(3)")
    never = stage("never", "open('ran', 'w')")
    monkeypatch.setattr(lanes, "QUEUE", (slow, failing, never))
    assert lanes.main() == 1
    out = capfdbinary.readouterr().out.decode()
    assert not Path("ran").exists()
    assert out.index("begun") < out.index("why")
    assert out.rstrip().endswith("why\n\n== failing FAILED; it says why above")
    assert out.count("why\n") == 1


def test_all_that_passes_is_shown_once(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """By whichever lane it was run, with how long each took."""
    queue = [stage(f"number-{n}", f"print('said by {n}')") for n in range(3)]
    monkeypatch.setattr(lanes, "QUEUE", queue)
    assert lanes.main() == 0
    out = capfdbinary.readouterr().out.decode()
    for number in range(3):
        assert out.count(f"said by {number}\n") == 1
        assert out.count(f" s  number-{number}\n") == 1


def test_a_lane_that_is_free_takes_the_next_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """All others are run beside the one that waits for the last of them."""
    others = [stage(f"other-{n}", "") for n in range(2)]
    last = stage("last", "open('last', 'w')")
    monkeypatch.setattr(lanes, "QUEUE", [stage("waits", until_there("last")), *others, last])
    assert lanes.main() == 0


def test_folders_that_take_longer_than_their_budget_are_named(tmp_path: Path) -> None:
    """A warning: a clock fails no test."""
    timings = tmp_path / "some.xml"
    timings.write_text(CASES)
    tests = timings_of(timings)
    assert tests["unit/test_a::test_one[x]"] == 1.5
    assert timings_of(tmp_path / "absent.xml") == {}
    lines = lines_of({"parts": 5.0}, tests, {"unit": 1.0, "sim": 4.0})
    assert [line for line in lines if "WARNING" in line] == [
        "WARNING: tests/unit took longer than its budget"
    ]
    assert "    1.8 s  unit (of 1 s)" in lines
    slowest = lines[lines.index("The 20 slowest tests:") + 1]
    assert slowest == "    3.0 s  sim/test_b::test_three"


def test_each_folder_of_tests_is_in_one_stage_and_has_a_budget() -> None:
    """But those that need another machine or environment, and those that only help."""
    folders = {path.parent.name for path in stages.TESTS_FOLDER.glob("*/test_*.py")}
    run = [
        Path(word).name
        for each in stages.QUEUE
        for word in each.command
        if word.startswith("tests/")
    ]
    assert sorted(run) == sorted(folders - {"gpu", "kube", "monitoring", "on_vllm", "sdk"})
    assert set(run) == set(stages.BUDGETS_S)
