"""Requests that are damaged on purpose: refused by type, at once, and nobody else notices."""

import asyncio
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from clusters import RunningCluster
from faults.amount import SEED, amount
from faults.harness import environment
from faults.operations import LOSSES, apply_all, make_datum, make_operations
from tinsmith import tensors
from tinsmith import v1 as pb
from tinsmith.v1 import types_pb2

MUTATIONS = amount(4000, full=50_000)
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

Target = tuple[str, str, Any]
"""A server's name, a method, and a valid request for it."""


@pytest.fixture(scope="module")
def attacked(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningCluster]:
    """A cluster of its own: many of the calls will wait for numbers that never come."""
    settings = {"TINSMITH_TRAINING_GAP_WAIT_S_MAX": "0.2", "TINSMITH_TRAINING_MODELS_MAX": "1000"}
    folder = tmp_path_factory.mktemp("attacked")
    with environment(**settings), RunningCluster(tiny_model, folder) as running:
        yield running


def targets(model_id: str, path: str) -> Sequence[Target]:
    """One valid request for every method that takes more than a page number."""
    data = [make_datum([1, 2, 3]), make_datum([4, 5])]
    lora = pb.LoraConfig(rank=2, seed=1)
    chunk = types_pb2.ModelInputChunk(tokens=tensors.encode(np.array([1, 2, 3])))
    prompt = types_pb2.ModelInput(chunks=[chunk])
    params = pb.SamplingParams(max_tokens=2, seed=1, temperature=0.5, top_p=0.9, top_k=5)
    kind = types_pb2.CHECKPOINT_KIND_TRAINING
    header = pb.WriteCheckpointHeader(path=path, base_model="tiny", lora_config=lora)
    training, sampler, checkpoint = "TrainingService", "SamplerService", "CheckpointService"
    compute = {"model_id": model_id, "seq_id": 1, "loss_fn": LOSSES, "data": data}
    adam = pb.AdamParams(learning_rate=1e-3)
    return [
        (training, "ForwardBackward", pb.ForwardBackwardRequest(**compute)),
        (training, "Forward", pb.ForwardRequest(**compute)),
        (training, "OptimStep", pb.OptimStepRequest(model_id=model_id, seq_id=1, adam_params=adam)),
        (
            training,
            "SaveCheckpoint",
            pb.SaveCheckpointRequest(model_id=model_id, seq_id=1, kind=kind, name="a"),
        ),
        (
            training,
            "LoadCheckpoint",
            pb.LoadCheckpointRequest(model_id=model_id, seq_id=1, path=path, with_optimizer=True),
        ),
        (training, "CreateModel", pb.CreateModelRequest(lora_config=lora, request_id="r")),
        (training, "GetModel", pb.GetModelRequest(model_id=model_id)),
        (training, "ListModels", pb.ListModelsRequest(page_size=2)),
        (sampler, "Sample", pb.SampleRequest(prompt=prompt, sampling_params=params)),
        (sampler, "ComputeLogprobs", pb.ComputeLogprobsRequest(prompt=prompt)),
        (checkpoint, "GetCheckpoint", pb.GetCheckpointRequest(path=path)),
        (checkpoint, "ReadCheckpoint", pb.ReadCheckpointRequest(path=path)),
        (checkpoint, "CopyCheckpoint", pb.CopyCheckpointRequest(source_path=path)),
        (checkpoint, "WriteCheckpoint", pb.WriteCheckpointRequest(header=header)),
        (checkpoint, "ExportCheckpoint", pb.ExportCheckpointRequest(path=path)),
    ]


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat, insert or enlarge, one to four times."""
    mutated = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(mutated) + 1)
        length = rng.randint(1, 8)
        match rng.randrange(6):
            case 0 if mutated:
                mutated[at % len(mutated)] ^= 1 << rng.randrange(8)
            case 1:
                del mutated[at : at + length]
            case 2:
                mutated[at:at] = mutated[at : at + length]
            case 3:
                mutated[at:at] = rng.randbytes(length)
            case 4:
                mutated[at:at] = b"\xff" * 9 + b"\x01"  # the largest number
            case _:
                del mutated[at:]
    return bytes(mutated)


@pytest.mark.timeout(900)
async def test_no_mutation_of_a_request_is_more_than_refused(attacked: RunningCluster) -> None:
    """A typed answer before the deadline, never INTERNAL, no process dies, and a model beside it
    all gets the bytes that it gets alone (row 22)."""
    rng = random.Random(SEED)
    channels = {
        f"{name.capitalize()}Service": grpc.aio.insecure_channel(address)
        for name, address in attacked.addresses.items()
    }
    training: Any = pb.TrainingServiceStub(channels["TrainingService"])
    lora = pb.CreateModelRequest(lora_config=pb.LoraConfig(rank=2, seed=1))
    victim, bystander, twin = [(await training.CreateModel(lora)).model.model_id for _ in range(3)]
    save = pb.SaveCheckpointRequest(model_id=twin, name="s", kind=2)
    path = (await training.SaveCheckpoint(save)).path
    operations = make_operations(SEED, 120)
    wanted = await apply_all(channels["TrainingService"], twin, operations)
    pids = [attacked.pid(name) for name in attacked.addresses] + [*attacked.rank_pids()]
    chosen = [rng.choice(targets(victim, path)) for _ in range(MUTATIONS)]
    attacks = [(s, m, mutate(request.SerializeToString(), rng)) for s, m, request in chosen]
    codes: Counter[grpc.StatusCode] = Counter()
    wrong: list[str] = []

    async def work() -> None:
        while attacks:
            service, method, content = attacks.pop()
            call = channels[service].stream_stream(f"/tinsmith.v1.{service}/{method}")
            try:
                async for _ in call(iter([content]), timeout=DEADLINE_S):
                    pass
                code, details = grpc.StatusCode.OK, ""
            except grpc.aio.AioRpcError as error:
                code, details = error.code(), error.details() or ""
            codes[code] += 1
            if code not in TYPED:
                wrong.append(f"{method} {content!r}: {code.name} {details}")

    under_attack = apply_all(channels["TrainingService"], bystander, operations)
    found, *_ = await asyncio.gather(under_attack, *(work() for _ in range(WORKERS)))
    assert wrong == []
    assert codes[grpc.StatusCode.INVALID_ARGUMENT] > MUTATIONS / 4
    assert found.messages == wanted.messages
    assert pids == [attacked.pid(name) for name in attacked.addresses] + [*attacked.rank_pids()]
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
    data or no token at all is refused by type in `tests/service/test_training.py` (row 23)."""
    datum = make_datum([1, 2, 3])
    del datum.loss_fn_inputs["weights"]
    for name, array in inputs.items():
        datum.loss_fn_inputs[name].CopyFrom(tensors.encode(array))
    with pb.connect(attacked.address) as stubs:
        lora = pb.CreateModelRequest(lora_config=pb.LoraConfig(rank=2, seed=1))
        model_id = stubs.training.CreateModel(lora).model.model_id
        request = pb.ForwardBackwardRequest(
            model_id=model_id, seq_id=1, loss_fn=loss_fn, data=[datum]
        )
        answers = list(stubs.training.ForwardBackward(iter([request]), timeout=30))
        logprobs = tensors.decode(answers[0].outputs[0].loss_fn_outputs["logprobs"])
        assert np.isfinite(logprobs).all()
        assert answers[-1].metrics["loss:sum"] == 0
        step = pb.OptimStepRequest(model_id=model_id, seq_id=2)
        assert stubs.training.OptimStep(step, timeout=30).metrics["grad_norm:last"] == 0
