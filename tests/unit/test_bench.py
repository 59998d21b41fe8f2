"""The benchmark itself: rows run to the end, and sides that disagree are found out."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bench import workloads
from bench.__main__ import main
from bench.harness import Agreement, Estimate, Result, Side, compare, estimate, measure
from bench.sides import Ours


@pytest.fixture(scope="module")
def run_dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], int]:
    """Runs row 1 on the tiny shape; its model is written once."""
    models = tmp_path_factory.mktemp("models")

    def run(out: Path) -> int:
        fixed = ["--shape", "T", "--pairs", "2", "--threads", "1", "--models", str(models)]
        return main(["1", *fixed, "--out", str(out)])

    return run


def test_a_row_is_measured_and_reported(
    run_dense: Callable[[Path], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both lines of row 1 agree with the bare loop, and reach the table, the JSON and the chart."""
    assert run_dense(tmp_path) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [result["row"] for result in found["results"]] == ["1", "1"]
    for result in found["results"]:
        assert result["verdict"] in ("met", "missed")
        assert result["estimate"]["low"] <= result["estimate"]["value"]
        assert result["estimate"]["value"] <= result["estimate"]["high"]
        assert result["what"] in printed
    assert found["machine"]["threads"] == "1"
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_gradient_fails_the_run(
    run_dense: Callable[[Path], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One part in a thousand is enough: the row FAILED and the exit status is 1."""
    right = Ours.take_gradients

    def wrong(self: Ours) -> dict[str, np.ndarray]:
        return {name: array * np.float32(1.001) for name, array in right(self).items()}

    monkeypatch.setattr(Ours, "take_gradients", wrong)
    assert run_dense(tmp_path) == 1
    assert "row 1 FAILED" in capsys.readouterr().out
    found = json.loads((tmp_path / "bench.json").read_text())
    assert {result["verdict"] for result in found["results"]} == {"FAILED"}


def test_agreement_sees_every_kind_of_difference() -> None:
    """Wrong logprobs, wrong or missing gradients, NaN, and a baseline without gradients."""
    good = ([np.zeros(3, np.float32)], {"a": np.ones(4, np.float32), "b": np.ones(2, np.float32)})
    assert compare(good, good).holds
    (logprobs,), gradients = good
    wrong = [
        ([logprobs + np.float32(2e-4)], gradients),
        ([logprobs * np.nan], gradients),
        ([], gradients),
        ([logprobs], gradients | {"b": np.full(2, np.nan, np.float32)}),
        ([logprobs], gradients | {"a": np.zeros(4, np.float32)}),
        ([logprobs], {"a": gradients["a"]}),
    ]
    for numbers in wrong:
        assert not compare(numbers, good).holds
    nothing = ([logprobs], {name: array * 0 for name, array in gradients.items()})
    assert not compare(nothing, nothing).holds


def test_rounds_alternate_and_warm_ups_do_not_count() -> None:
    """Sides run in turn, each after its preparation, every other round backwards."""
    seen: list[str] = []
    sides = [
        Side(name, lambda n=name: seen.append(n), lambda n=name: seen.append(f"prepare {n}"))
        for name in "ab"
    ]
    timings = measure(sides, 2, warm_ups=1)
    assert [name for name in seen if len(name) == 1] == ["a", "b", "b", "a", "a", "b"]
    assert seen[::2] == [f"prepare {name}" for name in seen[1::2]]
    assert {name: len(found) for name, found in timings.items()} == {"a": 2, "b": 2}


def test_intervals_hold_the_median() -> None:
    """Of equal samples it is a point; else its ends are samples around the median."""
    assert estimate(np.full(9, 0.5)) == Estimate(0.5, 0.5, 0.5)
    found = estimate(np.arange(9.0))
    assert 0 <= found.low < found.value == 4 < found.high <= 8


def test_verdicts() -> None:
    """A target is an upper bound unless it says otherwise; a failed row meets none."""
    point = Estimate(1.0, 1.0, 1.0)
    assert Result("1", "", point, target=1.0).met
    assert Result("1", "", point, target=0.9).met is False
    assert Result("1", "", point, target=0.9, higher_is_better=True).met
    assert Result("1", "", point).met is None
    assert Result("1", "", point, target=2.0, agreement=Agreement(1.0, 0.0)).met is None


def test_batches_have_the_padding_that_they_should() -> None:
    """The chosen batches waste 2.9 times their tokens, within a tenth, and stay under the cap."""
    for lengths in workloads.padded_batches(3):
        assert len(lengths) == 8
        assert max(lengths) <= 512
        assert abs(workloads.padding_factor(lengths) - 2.9) <= 0.1
