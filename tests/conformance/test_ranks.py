"""The DeepSpeed engine on one rank and on two, in all ZeRO stages, against the reference engine."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from rank_worker import CASES, EPS, EXPERT_CASES, FULL_CASES, eps_of, full_script, script

import programs
from engines import make_engine
from tinsmithd.trainer.engines.interface import TrainingEngine
from tiny_models import write_tiny_model


def reference(folder: Path) -> TrainingEngine:
    return make_engine(
        "reference", str(folder), dtype="float32", zero_stage=0, on_progress=lambda _: None
    )


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> Mapping[str, np.ndarray]:
    """What the reference engine computes."""
    return script(reference(tiny_model))


@pytest.fixture(scope="module")
def expected_of_full(tiny_model: Path) -> Mapping[str, np.ndarray]:
    """What the reference engine computes with a model that trains all weights."""
    return full_script(reference(tiny_model))


@pytest.fixture(scope="module")
def with_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with many experts in one layer, of which some get no token, and none in the other."""
    folder = tmp_path_factory.mktemp("experts") / "model"
    return write_tiny_model(
        *(folder, "qwen3_moe"), num_experts=128, moe_intermediate_size=8, mlp_only_layers=[0]
    )


@pytest.fixture(scope="module")
def expected_of_experts(with_experts: Path) -> Mapping[str, np.ndarray]:
    """What the reference engine computes, with PEFT's own layers."""
    return script(reference(with_experts), EPS[:1])


@pytest.fixture(scope="module", params=[1, 2])
def results(
    request: pytest.FixtureRequest,
    tiny_model: Path,
    with_experts: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[int, Path]:
    """Number of ranks, and the folder where they left what they computed in every case."""
    out = tmp_path_factory.mktemp("ranks")
    arguments = (str(tiny_model), str(with_experts), str(out), *CASES, *FULL_CASES, *EXPERT_CASES)
    done = programs.run("rank_worker", *arguments, ranks=request.param, timeout_s=300, forked=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, out


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", [*CASES, *FULL_CASES])
def test_ranks_agree_with_the_reference(
    expected: Mapping[str, np.ndarray],
    expected_of_full: Mapping[str, np.ndarray],
    results: tuple[int, Path],
    case: str,
) -> None:
    """Losses, logprobs and norms to 1e-5, weights to 1e-6, with more ranks than data too; with all
    weights trained, too, after which the base is as it was for the next model."""
    every = expected_of_full if case in FULL_CASES else expected
    begins = tuple(f"eps {eps:g} " for eps in eps_of(case))
    wanted = {name: array for name, array in every.items() if name.startswith(begins)}
    compare(results[1] / f"{case}.npz", wanted)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", EXPERT_CASES)
def test_experts_agree_with_peft(
    expected_of_experts: Mapping[str, np.ndarray], results: tuple[int, Path], case: str
) -> None:
    """The same of adapters on experts, which PEFT merges into copies of all of them."""
    compare(results[1] / f"{case}.npz", expected_of_experts)


def compare(file: Path, expected: Mapping[str, np.ndarray]) -> None:
    found = dict(np.load(file))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        if "weight" not in name:
            np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-5, err_msg=name)
        elif "eps 0.1" in name:
            np.testing.assert_allclose(found[name], array, atol=1e-6, rtol=0, err_msg=name)


def test_stage_3_holds_a_share_of_the_base_and_whole_adapters(
    results: tuple[int, Path],
) -> None:
    """Each of two ranks about half of the base; a resident adapter is whole on each."""
    ranks, folder = results
    for rank in range(ranks):
        partitioned = json.loads((folder / f"stage-3.{rank}.json").read_text())
        plain = json.loads((folder / f"stage-1.{rank}.json").read_text())
        kept = json.loads((folder / f"stage-3-kept.{rank}.json").read_text())
        assert plain["base"] == plain["whole"] == partitioned["whole"]
        assert partitioned["base"] == pytest.approx(plain["whole"] / ranks, rel=0.01)
        # What was gathered within the budget stays, beside the rank's own share.
        assert kept["base"] == plain["whole"] + partitioned["base"]
        assert partitioned["adapters"] == plain["adapters"] > 0


def test_stage_3_holds_a_share_of_a_full_model(results: tuple[int, Path]) -> None:
    """Of weights, gradients and moments each of two ranks has about half; in stage 1 of moments."""
    ranks, folder = results
    for rank in range(ranks):
        partitioned = json.loads((folder / f"full-stage-3.{rank}.json").read_text())
        share = pytest.approx(partitioned["whole"] / ranks, rel=0.01)
        assert partitioned["weights"] == share
        assert partitioned["gradients"] == share
        assert partitioned["moments"] == share
        plain = json.loads((folder / f"full-stage-1.{rank}.json").read_text())
        assert plain["weights"] == plain["whole"] == partitioned["whole"]
        assert plain["moments"] == pytest.approx(plain["whole"] / ranks, rel=0.01)
