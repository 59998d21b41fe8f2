"""Creations and checkpoints that end the ranks, and are sent again and again."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

import tinsmith
from attack.hostile_checkpoints import LORA, STEPS, good_files
from checkpoints import ServerProcess
from faults.processes import Training
from tinsmith import v1 as pb
from wire import reason_and_field

PATH = "tinsmith://somebody/weights/deadly"
POISONED = (grpc.StatusCode.FAILED_PRECONDITION, "CALL_POISONED")
AGAIN = (grpc.StatusCode.UNAVAILABLE, "RANK_GROUP_UNAVAILABLE")


@pytest.fixture
def training(tiny_model: Path, tmp_path: Path) -> Iterator[Training]:
    """A Training server with a checkpoint at `PATH`."""
    (tmp_path / "checkpoints").mkdir()
    with ServerProcess(tmp_path / "checkpoints" / "data") as checkpoints:
        lora = pb.LoraConfig(rank=LORA.rank, seed=0)
        header = {"base_model": tiny_model.name, "lora_config": lora, "step_count": STEPS}
        checkpoints.write(good_files(), PATH, **header)
        target = {"checkpoint_target": checkpoints.address}
        with Training(tiny_model, tmp_path, rank_lease_s=5, **target) as running:
            yield running


def create(training: Training, request_id: str) -> tuple[grpc.StatusCode, str]:
    """How a creation from the checkpoint is refused, once there are ranks."""
    request = pb.CreateModelRequest(checkpoint_path=PATH, request_id=request_id)
    with grpc.insecure_channel(training.address) as channel:
        stub = pb.TrainingServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refusal:
            stub.CreateModel(request, timeout=60)
    return refusal.value.code(), reason_and_field(refusal.value)[0]


def start_ranks(training: Training, **env: str) -> None:
    """Start a rank group, and wait until it is at work."""
    training.start_rank(env=env, engine="reference")
    # It takes a moment, and creates a model of the ordinary kind.
    service = tinsmith.ServiceClient(base_url=training.address)
    service.create_lora_training_client("tiny-llama", rank=2).result(90)


def test_creation_counts_attempts_as_calls_do(training: Training) -> None:
    """A checkpoint that ends the ranks twice is refused from then on, also after a restart: to who
    sends the same request again, to another one for the same content, and to a load."""
    deadly = {"TINSMITH_FAILPOINTS": "import_mid:abort"}
    for expected in (AGAIN, POISONED):
        start_ranks(training, **deadly)
        assert create(training, "one") == expected
        assert training.ranks[-1].wait() == -signal.SIGABRT
    start_ranks(training, **deadly)
    assert create(training, "one") == POISONED
    assert create(training, "two") == POISONED
    service = tinsmith.ServiceClient(base_url=training.address)
    client = service.create_lora_training_client("tiny-llama", rank=LORA.rank).result(90)
    with pytest.raises(tinsmith.FailedPreconditionError) as refusal:
        client.load_state(PATH).result(60)
    assert refusal.value.reason == "CALL_POISONED"
    training.restart_server()
    assert client.optim_step(tinsmith.AdamParams()).result(90).metrics["step:last"] == 1
    assert create(training, "one") == POISONED
    os.kill(training.ranks[-1].pid, 0)  # these ranks never heard of it
