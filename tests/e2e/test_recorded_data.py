"""Models and checkpoints of an earlier version go on: real data, which its own servers wrote.

`tests/recorded/before-0.1.0.tar.xz` has a base model, the data folder of a cluster that was killed
with SIGKILL while gradients were pending (commit bdeb8a0, snapshots every two steps), and in
`expected.json` what the same calls gave on that commit to a model that nothing happened to. Where
the machine is the one that recorded them, the numbers of training are the same to the last bit;
those of the Sampler have another decoder since.
"""

import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinsmith
from clusters import RunningCluster
from programs import environment
from tinsmith import types

RECORDED = Path(__file__).parents[1] / "recorded" / "before-0.1.0.tar.xz"
ADAM = types.AdamParams(learning_rate=1e-2, weight_decay=0.1)
PROMPT = (5, 200, 31, 7, 90)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded files."""
    folder = tmp_path_factory.mktemp("recorded")
    with tarfile.open(RECORDED) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def service(recorded: Path) -> Iterator[tinsmith.ServiceClient]:
    """A way into a cluster on the recorded data; another machine than theirs comes close, and its
    models have not been called since then."""
    settings = {"REPLAY_CHECK": "close", "MODEL_IDLE_TTL_S": "1e10"}
    with (
        environment(**{f"TINSMITH_TRAINING_{name}": value for name, value in settings.items()}),
        RunningCluster(recorded / "recorded-llama", recorded / "data") as running,
    ):
        yield tinsmith.ServiceClient(base_url=running.address)


@pytest.fixture(scope="module")
def expected(recorded: Path) -> Any:
    """What calls gave, by the model and the call; paths and ids."""
    return json.loads((recorded / "expected.json").read_text())


def make_data(seed: int) -> Sequence[types.Datum]:
    """The data that were recorded."""
    rng = np.random.default_rng(seed)
    data = []
    for _ in range(3):
        tokens = rng.integers(0, 256, int(rng.integers(4, 12)))
        weights = rng.normal(size=len(tokens) - 1).astype(np.float32)
        inputs = {"target_tokens": tokens[1:], "weights": weights}
        data.append(types.Datum(types.ModelInput.from_ints(tokens[:-1].tolist()), inputs))
    return data


def assert_steps(model: tinsmith.TrainingClient, number: int, name: str, expected: Any) -> None:
    """A step over what is pending."""
    metrics = model.optim_step(ADAM).result(60).metrics
    norm, step = expected[f"{name} optim_step {number}"]
    assert metrics["step:last"] == step
    assert metrics["grad_norm:last"] == pytest.approx(norm, rel=1e-4)


def assert_trains(model: tinsmith.TrainingClient, number: int, name: str, expected: Any) -> None:
    """A call, and the step after it."""
    result = model.forward_backward(make_data(number), "cross_entropy").result(60)
    loss, logprobs = expected[f"{name} forward_backward {number}"]
    assert result.metrics["loss:sum"] == pytest.approx(loss, rel=1e-4, abs=1e-4)
    for output, values in zip(result.loss_fn_outputs, logprobs, strict=True):
        np.testing.assert_allclose(np.asarray(output["logprobs"]), values, atol=1e-4)
    assert_steps(model, number, name, expected)


@pytest.mark.parametrize("name", ["all", "attention"])
def test_a_model_goes_on_from_its_journal(
    service: tinsmith.ServiceClient, expected: Any, name: str
) -> None:
    """From a snapshot and the calls behind it, with the gradients that were pending."""
    model = service.get_training_client(expected[f"{name} id"]).result(60)
    assert_steps(model, 4, name, expected)
    assert_trains(model, 5, name, expected)
    model.load_state_with_optimizer(expected[f"{name} path"]).result(60)
    assert_trains(model, 6, name, expected)


@pytest.mark.parametrize("name", ["all", "attention"])
def test_the_sampler_serves_a_checkpoint(
    service: tinsmith.ServiceClient, expected: Any, name: str
) -> None:
    sampler = service.create_sampling_client(model_path=expected[f"{name} sampler path"])
    found = sampler.compute_logprobs(types.ModelInput.from_ints(PROMPT)).result(60)
    assert found[1:] == pytest.approx(expected[f"{name} scored"], abs=1e-4)


def test_a_full_model_comes_back_from_its_checkpoint(
    service: tinsmith.ServiceClient, expected: Any
) -> None:
    """Weights and moments."""
    path = expected["full path"]
    model = service.create_training_client_from_state_with_optimizer(path).result(60)
    assert_trains(model, 3, "full", expected)
