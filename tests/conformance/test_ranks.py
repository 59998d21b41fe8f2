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
    EVERYTHING,
    EXPERT_CASES,
    IN_ORDER_CASES,
    STAGES,
    eps_of,
    full_script,
    is_full,
    script,
)

import programs
from engines import make_engine
from tinsmithd.trainer.engines.interface import TrainingEngine
from tiny_models import write_tiny_model

SHORT = {
    1: [
        *("one-resident", "recomputed", "stage-3-offloaded", "full-recomputed", "full-stage-3"),
        "experts-stage-3-recomputed",
    ],
    2: [
        *(*STAGES, "offloaded", "stage-3-kept", "full-stage-1", "full-stage-3"),
        *("full-spread-stage-3", "experts-stage-1", "experts-spread-stage-3"),
        *("in-order-stage-0", "in-order-full-stage-3"),
    ],
}
"""By number of ranks: each thing that a rank does, alone or with another, once or so."""
WITHIN_A_RANK = ("one-resident", "recomputed", "full-recomputed", "experts-recomputed")
"""What a rank does by itself, be it alone or not."""
ALL_OF_ONE = [
    name
    for name, case in EVERY_CASE.items()
    if "sequence_parallel" not in case
    and name not in IN_ORDER_CASES
    and (case["zero_stage"] in (0, 3) or name in ("one-resident", "offloaded"))
]
"""Stages 1 and 2 share out what one rank has anyway."""
ALL_OF_TWO = [name for name in EVERY_CASE if name not in WITHIN_A_RANK]
OF_ONE = ALL_OF_ONE if EVERYTHING else SHORT[1]
OF_TWO = ALL_OF_TWO if EVERYTHING else SHORT[2]
OF_FOUR = ["spread-stage-3-recomputed", "in-order-stage-1"]
"""Two pairs of ranks, of which each has data of its own, or none while the other has; and enough of
them that it matters in which order they add up."""


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
        name = "full" if is_full(case) else "experts" if case in EXPERT_CASES else "lora"
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
def test_four_ranks_agree_with_the_reference(
    expected: Callable[[str], Mapping[str, np.ndarray]], of_four: Path, case: str
) -> None:
    """The same, where pairs compute a datum together, some of them none; and sums in order."""
    compare(of_four / f"{case}.npz", expected(case))


def compare(file: Path, expected: Mapping[str, np.ndarray]) -> None:
    found = dict(np.load(file))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        if "weight" not in name:
            np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-5, err_msg=name)
        elif "eps 0.1" in name:
            np.testing.assert_allclose(found[name], array, atol=1e-6, rtol=0, err_msg=name)


@pytest.mark.parametrize("case", STAGES)
def test_ranks_speak_as_often_however_many_micro_batches_a_call_has(
    of_two: Path, case: str
) -> None:
    """In a call and the step after it: the collectives of two micro-batches are those of many. (In
    stage 3 DeepSpeed gathers the base in each micro-batch besides, by functions of its own.)"""
    for rank in range(2):
        found = json.loads((of_two / f"{case}.{rank}.json").read_text())["collectives"]
        few, many = found
        assert few["micro_batches"] == 2
        assert many["micro_batches"] >= 10
        assert few["counts"] == many["counts"]
        assert few["counts"]["all_gather_into_tensor"] == 1
        assert 3 <= sum(few["counts"].values()) <= 6


@pytest.mark.parametrize("case", [*STAGES, "full-stage-1", "full-stage-3"])
def test_a_state_is_copied_to_the_host_of_one_rank_alone(of_two: Path, case: str) -> None:
    """The others send their shares, and copy nothing; padding is all that the first has besides."""
    first, other = (json.loads((of_two / f"{case}.{rank}.json").read_text()) for rank in range(2))
    assert first["state"] <= first["copied"] <= 1.02 * first["state"] + 4096
    assert other["copied"] == other["state"] == 0


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


@pytest.mark.parametrize("rank", range(4))
def test_ranks_add_up_in_their_order_where_they_are_told_to(of_four: Path, rank: int) -> None:
    """To the last bit, whatever order a collective library has."""
    assert json.loads((of_four / f"in-order-stage-1.{rank}.json").read_text())["in order"]


def test_what_is_computed_by_default_is_among_everything() -> None:
    """A name that is none would be a case that nobody runs."""
    assert set(SHORT[1]) <= set(ALL_OF_ONE)
    assert set(SHORT[2]) <= set(ALL_OF_TWO)
