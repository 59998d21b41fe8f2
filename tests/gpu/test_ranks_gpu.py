"""Ranks on GPUs: what `conformance/test_ranks.py` has on processors, with NCCL.

Ranks are processes of their own, one for each GPU; who has fewer GPUs skips their number. Sums on a
GPU have another order, so numbers agree to 1e-3, and weights after steps at a large eps to 1e-4.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from rank_worker import EPS, full_script, script

import programs
from engines import make_engine
from tiny_models import write_tiny_model

OF_ONE = (
    *("stage-0", "stage-1", "stage-3", "one-resident", "recomputed", "offloaded"),
    *("stage-3-kept", "stage-3-offloaded", "full-stage-1", "full-stage-3"),
    *("full-stage-3-offloaded", "experts-stage-0", "experts-stage-3"),
)
OF_TWO = (
    *("stage-0", "stage-1", "stage-2", "stage-3", "offloaded", "stage-3-kept"),
    *("stage-3-recomputed", "stage-3-offloaded", "full-stage-1", "full-stage-3"),
    *("experts-stage-1", "experts-stage-3", "spread", "spread-stage-3-recomputed"),
    *("full-spread-stage-3", "experts-spread-stage-3", "in-order-stage-1"),
)
OF_FOUR = ("stage-3", "spread", "in-order-stage-1")
CASES = {1: OF_ONE, 2: OF_TWO, 4: OF_FOUR}
EVERY = [(ranks, case) for ranks, cases in CASES.items() for case in cases]

Results = Mapping[int, Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Path]:
    """A dense model, and one with many experts in one layer."""
    root = tmp_path_factory.mktemp("models")
    experts = {"num_experts": 128, "moe_intermediate_size": 8, "mlp_only_layers": [0]}
    return (
        write_tiny_model(root / "dense"),
        write_tiny_model(root / "experts", "qwen3_moe", **experts),
    )


@pytest.fixture(scope="module")
def results(models: Sequence[Path], tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Where the ranks left what they computed, by their number; as many as there are GPUs."""
    found = {}
    for ranks, cases in CASES.items():
        if ranks > torch.cuda.device_count():
            continue
        out = tmp_path_factory.mktemp(f"ranks-{ranks}")
        done = programs.run(
            *("rank_worker", *map(str, models), str(out), *cases),
            **{"ranks": ranks, "timeout_s": 900, "forked": False},  # type: ignore[arg-type]
        )
        assert done.returncode == 0, done.stderr[-5000:]
        found[ranks] = out
    return found


@pytest.fixture(scope="module")
def expected(models: Sequence[Path]) -> Mapping[str, Mapping[str, np.ndarray]]:
    """What the reference engine computes, in float32 on one GPU."""
    dense, experts = (
        make_engine("reference", str(folder), dtype="float32", zero_stage=0) for folder in models
    )
    return {
        "lora": script(dense),
        "experts": script(experts, EPS[:1]),
        "full": full_script(make_engine("reference", str(models[0]), dtype="float32")),
    }


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("ranks", "case"), EVERY)
def test_ranks_agree_with_the_reference(
    results: Results, expected: Mapping[str, Mapping[str, np.ndarray]], ranks: int, case: str
) -> None:
    """Losses, logprobs, norms and weights of two models, or of a whole one."""
    if ranks not in results:
        pytest.skip(f"needs {ranks} GPUs")
    kind = next((kind for kind in ("full", "experts") if f"{kind}-" in case), "lora")
    right = expected[kind]
    found = dict(np.load(results[ranks] / f"{case}.npz"))
    assert found
    for name, array in found.items():
        if "weight" not in name:
            np.testing.assert_allclose(array, right[name], rtol=1e-3, atol=1e-3, err_msg=name)
        elif "eps 0.1" in name:
            np.testing.assert_allclose(array, right[name], atol=1e-4, rtol=0, err_msg=name)


@pytest.mark.parametrize("case", ["stage-0", "stage-1", "stage-2"])
def test_ranks_speak_as_often_however_many_micro_batches_a_call_has(
    results: Results, case: str
) -> None:
    """With NCCL as with gloo."""
    if 2 not in results:
        pytest.skip("needs 2 GPUs")
    few, many = json.loads((results[2] / f"{case}.0.json").read_text())["collectives"]
    assert many["micro_batches"] > few["micro_batches"]
    assert few["counts"] == many["counts"]


@pytest.mark.parametrize("case", ["stage-1", "stage-3", "full-stage-3"])
def test_a_state_is_copied_to_the_host_of_one_rank_alone(results: Results, case: str) -> None:
    """The other one sends its share over NCCL."""
    if 2 not in results:
        pytest.skip("needs 2 GPUs")
    first, other = (json.loads((results[2] / f"{case}.{r}.json").read_text()) for r in range(2))
    assert first["state"] <= first["copied"] <= 1.02 * first["state"] + 4096
    assert other["copied"] == other["state"] == 0


def test_sums_have_the_order_of_the_ranks_where_they_are_told_to(results: Results) -> None:
    """To the last bit, whatever NCCL chooses."""
    most = max(results)
    if most == 1:
        pytest.skip("needs 2 GPUs")
    for rank in range(most):
        found = json.loads((results[most] / f"in-order-stage-1.{rank}.json").read_text())
        assert found["in order"]
