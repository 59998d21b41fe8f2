"""Requests that are damaged on purpose: refused by type, at once, and nobody else notices."""

import asyncio
import random
from typing import Any

import grpc
import numpy as np
import pytest

from attack.amount import SEED, amount
from attack.harness import Watch, targets_of, watching
from attack.mutate import mutate
from attack.requests import ENDLESS, SERVICES, datum, every_method, valid_requests
from clusters import RunningCluster
from faults.operations import LOSSES, apply_all, make_operations
from tinsmith import tensors
from tinsmith import v1 as pb
from tinsmith.cluster import connect

MUTATIONS = amount(300)
"""For each server."""
WORKERS = 8
DEADLINE_S = 30.0
TYPED = {
    grpc.StatusCode.OK,  # what a mutation left valid
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
"""All that a request, whatever it says, may be answered with."""


@pytest.mark.timeout(3600)  # 15,000 requests with N=5000
async def test_no_mutation_of_a_request_is_more_than_refused(attacked: RunningCluster) -> None:
    """A typed answer before the deadline, never INTERNAL, no process dies, and a model beside it
    all gets the bytes that it gets alone."""
    rng = random.Random(SEED)
    channels = {
        name: grpc.aio.insecure_channel(address) for name, address in attacked.addresses.items()
    }
    training: Any = pb.TrainingServiceStub(channels["training"])
    lora = pb.CreateModelRequest(lora_config=pb.LoraConfig(rank=2, seed=1))
    victim, bystander, twin = [(await training.CreateModel(lora)).model.model_id for _ in range(3)]
    save = pb.SaveCheckpointRequest(model_id=twin, name="s", kind=1)
    path = (await training.SaveCheckpoint(save)).checkpoint_path
    operations = make_operations(SEED, 60)
    wanted = await apply_all(channels["training"], twin, operations)
    valid = valid_requests(victim, path)
    attacks = [
        (method, mutate(valid[method.name], rng))
        for method in every_method()
        for _ in range(MUTATIONS // len(SERVICES[method.server].methods) + 1)
    ]
    rng.shuffle(attacks)
    wrong: list[str] = []

    async def work(watch: Watch) -> None:
        while attacks:
            method, content = attacks.pop()
            call = channels[method.server].stream_stream(method.path)
            try:
                stream = call(iter([content]), timeout=DEADLINE_S)
                async for _ in stream:
                    if method.name in ENDLESS:
                        break
                stream.cancel()
                code, details = grpc.StatusCode.OK, ""
            except grpc.aio.AioRpcError as error:
                code, details = error.code(), error.details() or ""
            watch.answered(code)
            if code not in TYPED:
                wrong.append(f"{method.name} {content!r}: {code.name} {details}")

    with watching(targets_of(attacked)) as watch:
        under_attack = apply_all(channels["training"], bystander, operations)
        found, *_ = await asyncio.gather(under_attack, *(work(watch) for _ in range(WORKERS)))
    assert wrong == []
    assert watch.codes[grpc.StatusCode.INVALID_ARGUMENT] > MUTATIONS / 4
    assert found.messages == wanted.messages
    for channel in channels.values():
        await channel.close()


ZERO = np.zeros(2, np.float32)


@pytest.mark.parametrize(
    ("loss_fn", "inputs"),
    [
        pytest.param(LOSSES, {"weights": ZERO}, id="no weight"),
        pytest.param(
            pb.LossFn(importance_sampling=pb.ImportanceSamplingLoss()),
            {"logprobs": ZERO, "advantages": ZERO},
            id="no advantage",
        ),
        pytest.param(
            pb.LossFn(ppo=pb.PpoLoss()),
            {"logprobs": np.full(2, -1e4, np.float32), "advantages": ZERO},
            id="no advantage and a ratio that overflows",
        ),
    ],
)
def test_a_call_that_asks_for_nothing_gets_numbers(
    attacked: RunningCluster, loss_fn: pb.LossFn, inputs: dict[str, np.ndarray]
) -> None:
    """All-zero weights and advantages: a finite loss, a gradient of zero, never NaN; what has no
    data or no token at all is refused by type in `tests/service/test_training_refusals.py`."""
    given = datum(2)
    del given.loss_fn_inputs["weights"]
    for name, array in inputs.items():
        given.loss_fn_inputs[name].CopyFrom(tensors.encode(array))
    with connect(attacked.address) as stubs:
        lora = pb.CreateModelRequest(lora_config=pb.LoraConfig(rank=2, seed=1))
        model_id = stubs.training.CreateModel(lora).model.model_id
        request = pb.ForwardBackwardRequest(
            model_id=model_id, seq_id=1, loss_fn=loss_fn, data=[given]
        )
        answers = list(stubs.training.ForwardBackward(iter([request]), timeout=30))
        logprobs = tensors.decode(answers[0].outputs[0].loss_fn_outputs["logprobs"])
        assert np.isfinite(logprobs).all()
        assert answers[-1].metrics["loss:sum"] == 0
        step = pb.OptimStepRequest(model_id=model_id, seq_id=2)
        assert stubs.training.OptimStep(step, timeout=30).metrics["grad_norm:last"] == 0
