"""Models that recover: what they are trained on, and what is seen of it."""

import grpc
import numpy as np

import tinsmith
from faults.processes import Training
from tinsmith import types
from tinsmith import v1 as pb

STEPS = 7
Seen = list[object]
"""What calls answered, in their order."""


def data(seed: int, weight: float = 1.0) -> list[types.Datum]:
    """Three random data of 12 tokens."""
    rng = np.random.default_rng(seed)
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(rng.integers(0, 256, 12).tolist()),
            loss_fn_inputs={
                "target_tokens": rng.integers(0, 256, 12),
                "weights": np.full(12, weight, np.float32),
            },
        )
        for _ in range(3)
    ]


def train(client: tinsmith.TrainingClient, first: int, last: int) -> Seen:
    """Some steps, all calls sent at once; every value that came back."""
    futures = []
    for step in range(first, last):
        futures.append(client.forward_backward(data(step), "cross_entropy"))
        futures.append(client.optim_step(types.AdamParams(learning_rate=1e-2)))
    return [values(future.result(90)) for future in futures]


def values(answer: object) -> object:
    """All that an answer says, exactly."""
    if isinstance(answer, types.ForwardBackwardOutput):
        outputs = [np.asarray(o["logprobs"]).tobytes() for o in answer.loss_fn_outputs]
        return outputs, dict(answer.metrics)
    return dict(answer.metrics)  # type: ignore[attr-defined]


def model_of(service: tinsmith.ServiceClient, seed: int = 1) -> tinsmith.TrainingClient:
    """A model of rank 4."""
    return service.create_lora_training_client("tiny-llama", rank=4, seed=seed).result(90)


def two_trained(
    training: Training, steps: int
) -> tuple[tinsmith.TrainingClient, tinsmith.TrainingClient, Seen]:
    """Two models that were trained alike, and what was seen of one."""
    service = tinsmith.ServiceClient(base_url=training.address)
    client, other = model_of(service), model_of(service)
    seen = train(client, 0, steps)
    assert train(other, 0, steps) == seen
    return client, other, seen


def state(training: Training, model_id: str) -> pb.Model:
    """What the server says of a model."""
    with grpc.insecure_channel(training.address) as channel:
        stub = pb.TrainingServiceStub(channel)
        return stub.GetModel(pb.GetModelRequest(model_id=model_id), timeout=60).model
