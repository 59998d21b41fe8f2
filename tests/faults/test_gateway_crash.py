"""A gateway that is killed, again and again, while a program trains through it."""

import itertools
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from attack.amount import SEED
from clusters import RunningCluster
from gateways import RunningGateway, running_gateway
from sdk_calls import Sdk, call

STEPS = 6
KILLS = 6


def program(sdk: Sdk) -> Any:
    """Train, all calls under way before the first result is read; a save and a load within."""
    model_id = sdk.model()
    numbers = itertools.count(1)
    promises: list[tuple[str, Any]] = []
    for step in range(STEPS):
        for _ in range(2):
            promises.append(("pass", sdk.post("forward_backward", call(model_id, next(numbers)))))
        adam = {"learning_rate": 0.001 * (step + 1)}
        body = {"model_id": model_id, "seq_id": next(numbers), "adam_params": adam}
        promises.append(("step", sdk.post("optim_step", body)))
    save = {"model_id": model_id, "seq_id": next(numbers), "path": "end"}
    promises.append(("step", sdk.post("save_weights", save)))
    last = call(model_id, next(numbers), forward_only=True)
    promises.append(("pass", sdk.post("forward_backward", last)))
    found: list[Any] = []
    for kind, promise in promises:
        result = sdk.passed(promise) if kind == "pass" else sdk.result(promise)
        if kind == "pass":
            found.append((dict(result.metrics), result.loss_fn_outputs[0].fields["logprobs"].data))
        else:
            assert "error" not in result, result
            found.append(result.get("metrics"))
    return found


@pytest.fixture
def gateway_to_kill(cluster: RunningCluster, tmp_path: Path) -> Any:
    """A gateway of this test's own."""
    with running_gateway(cluster.address, tmp_path) as gateway:
        yield gateway


def test_a_program_ends_with_the_same_bits(gateway_to_kill: RunningGateway) -> None:
    """Nothing is lost and nothing done twice: every loss, every logprob, every count of steps."""
    undisturbed = program(Sdk(gateway_to_kill, patient=True))
    assert [each["step:last"] for each in undisturbed[2:-2:3]] == list(range(1, STEPS + 1))
    found: list[Any] = []
    running = threading.Thread(
        target=lambda: found.append(program(Sdk(gateway_to_kill, patient=True)))
    )
    rng = random.Random(SEED)
    running.start()
    for _ in range(KILLS):
        running.join(rng.uniform(0.02, 0.25))
        gateway_to_kill.kill()
        gateway_to_kill.start()
    running.join(200)
    assert found == [undisturbed]


def test_another_gateway_keeps_its_promises(
    cluster: RunningCluster, gateway_to_kill: RunningGateway, tmp_path: Path
) -> None:
    """Behind a balancer any of them answers what any other one promised."""
    sdk = Sdk(gateway_to_kill)
    model_id = sdk.model()
    # Promised before the call before it came: it is written down, and waits.
    promises = [sdk.post("forward_backward", call(model_id, number)) for number in (2, 1)]
    step = {"model_id": model_id, "seq_id": 3, "adam_params": {}}
    promises.append(sdk.post("optim_step", step))
    first = [sdk.result(promise) for promise in promises]
    gateway_to_kill.kill()
    with running_gateway(cluster.address, tmp_path / "other") as other:
        sdk.gateway = other
        assert [sdk.result(promise) for promise in promises] == first
        assert sdk.result(sdk.post("optim_step", step)) == first[-1]


def test_what_was_promised_and_never_sent_is_sent(gateway_to_kill: RunningGateway) -> None:
    """A gateway that dies before the Training server has a step has said all of it to the SDK."""
    sdk = Sdk(gateway_to_kill, patient=True)
    model_id = sdk.model()
    step = {"model_id": model_id, "seq_id": 2, "adam_params": {"learning_rate": 0.5}}
    promise = sdk.post("optim_step", step)  # it waits for the first one
    gateway_to_kill.kill()
    gateway_to_kill.start()
    sdk.post("optim_step", {"model_id": model_id, "seq_id": 1, "adam_params": {}})
    assert sdk.result(promise)["metrics"]["step:last"] == 2
