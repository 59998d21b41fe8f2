"""The DeepSpeed engine on one rank and on two, in all ZeRO stages, against the reference engine."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from rank_worker import (
    EPS,
    EVERY_CASE,
    EXPERT_CASES,
    FULL_CASES,
    SEVERAL_A_ROUND,
    eps_of,
    full_script,
    script,
)

import programs
from engines import make_engine
from tinsmithd.trainer.engines.interface import TrainingEngine
from tiny_models import write_tiny_model

WITHIN_A_RANK = ("one-resident", "recomputed", "full-recomputed", "experts-recomputed")
"""What a rank does by itself, be it alone or not."""
OF_ONE = [
    name
    for name, case in EVERY_CASE.items()
    if "sequence_parallel" not in case
    and (case["zero_stage"] in (0, 3) or name in ("one-resident", "offloaded"))
]
"""Stages 1 and 2 share out what one rank has anyway."""
OF_TWO = [name for name in EVERY_CASE if name not in WITHIN_A_RANK]
OF_FOUR = ["spread-stage-3-recomputed"]
"""Two pairs of ranks, of which each has data of its own, or none while the other has."""


def reference(folder: Path) -> TrainingEngine:
    return make_engine(
        "reference", str(folder), dtype="float32", zero_stage=0, on_progress=lambda _: None
    )


@pytest.fixture(scope="module")
def with_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with many experts in one layer, of which some get no token, and none in the other."""
    folder = tmp_path_factory.mktemp("experts") / "model"
    return write_tiny_model(
        *(folder, "qwen3_moe"), num_experts=128, moe_intermediate_size=8, mlp_only_layers=[0]
    )


def run(ranks: int, cases: Sequence[str], out: Path, *models: Path) -> Path:
    """Have ranks leave in a folder what they compute in some cases."""
    arguments = (*map(str, models), str(out), *cases)
    done = programs.run("rank_worker", *arguments, ranks=ranks, timeout_s=600, forked=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def of_one(tiny_model: Path, with_experts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a rank that is alone left what it computed in its cases."""
    return run(1, OF_ONE, tmp_path_factory.mktemp("one"), tiny_model, with_experts)


@pytest.fixture(scope="module")
def of_two(tiny_model: Path, with_experts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks left what they computed in their cases."""
    return run(2, OF_TWO, tmp_path_factory.mktemp("two"), tiny_model, with_experts)


@pytest.fixture(scope="module")
def of_four(tiny_model: Path, with_experts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where four ranks left what they computed in their cases."""
    return run(4, OF_FOUR, tmp_path_factory.mktemp("four"), tiny_model, with_experts)


@pytest.fixture(scope="module")
def expected(tiny_model: Path, with_experts: Path) -> Callable[[str], Mapping[str, np.ndarray]]:
    """What the reference engine computes in a case; experts with PEFT's own layers."""

    @functools.cache
    def kind(cases: str) -> Mapping[str, np.ndarray]:
        if cases == "experts":
            return script(reference(with_experts), EPS[:1])
        return (full_script if cases == "full" else script)(reference(tiny_model))

    def of_case(case: str) -> Mapping[str, np.ndarray]:
        name = "full" if case in FULL_CASES else "experts" if case in EXPERT_CASES else "lora"
        begins = tuple(f"eps {eps:g} " for eps in eps_of(case))
        return {name: array for name, array in kind(name).items() if name.startswith(begins)}

    return of_case


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", OF_ONE)
def test_a_rank_agrees_with_the_reference(
    expected: Callable[[str], Mapping[str, np.ndarray]], of_one: Path, case: str
) -> None:
    """Losses, logprobs and norms to 1e-5, weights to 1e-6; with all weights trained, too, after
    which the base is as it was for the next model."""
    compare(of_one / f"{case}.npz", expected(case))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", OF_TWO)
def test_two_ranks_agree_with_the_reference(
    expected: Callable[[str], Mapping[str, np.ndarray]], of_two: Path, case: str
) -> None:
    """The same, with more ranks than data too."""
    compare(of_two / f"{case}.npz", expected(case))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", OF_FOUR)
def test_two_pairs_of_ranks_agree_with_the_reference(
    expected: Callable[[str], Mapping[str, np.ndarray]], of_four: Path, case: str
) -> None:
    """The same, where some of the ranks compute a datum together; with pairs without a datum."""
    compare(of_four / f"{case}.npz", expected(case))


def compare(file: Path, expected: Mapping[str, np.ndarray]) -> None:
    found = dict(np.load(file))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        if "weight" not in name:
            np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-5, err_msg=name)
        elif "eps 0.1" in name:
            np.testing.assert_allclose(found[name], array, atol=1e-6, rtol=0, err_msg=name)


@pytest.mark.parametrize("case", SEVERAL_A_ROUND)
def test_ranks_speak_as_often_however_many_micro_batches_a_call_has(
    of_two: Path, case: str
) -> None:
    """In a call and the step after it: the collectives of two micro-batches are those of many. (In
    stage 3 each micro-batch gathers the base.)"""
    for rank in range(2):
        found = json.loads((of_two / f"{case}.{rank}.json").read_text())["collectives"]
        few, many = found
        assert few["micro_batches"] == 2
        assert many["micro_batches"] >= 10
        assert few["counts"] == many["counts"]
        assert 3 <= sum(few["counts"].values()) <= 8


def test_stage_3_holds_a_share_of_the_base_and_whole_adapters(of_two: Path) -> None:
    """Each of two ranks about half of the base; a resident adapter is whole on each."""
    for rank in range(2):
        partitioned = json.loads((of_two / f"stage-3.{rank}.json").read_text())
        plain = json.loads((of_two / f"stage-1.{rank}.json").read_text())
        kept = json.loads((of_two / f"stage-3-kept.{rank}.json").read_text())
        assert plain["base"] == plain["whole"] == partitioned["whole"]
        assert partitioned["base"] == pytest.approx(plain["whole"] / 2, rel=0.01)
        # What was gathered within the budget stays, beside the rank's own share.
        assert kept["base"] == plain["whole"] + partitioned["base"]
        assert partitioned["adapters"] == plain["adapters"] > 0


def test_stage_3_holds_a_share_of_a_full_model(of_two: Path) -> None:
    """Of weights, gradients and moments each of two ranks has about half; in stage 1 of moments."""
    for rank in range(2):
        partitioned = json.loads((of_two / f"full-stage-3.{rank}.json").read_text())
        share = pytest.approx(partitioned["whole"] / 2, rel=0.01)
        assert partitioned["weights"] == share
        assert partitioned["gradients"] == share
        assert partitioned["moments"] == share
        plain = json.loads((of_two / f"full-stage-1.{rank}.json").read_text())
        assert plain["weights"] == plain["whole"] == partitioned["whole"]
        assert plain["moments"] == pytest.approx(plain["whole"] / 2, rel=0.01)
