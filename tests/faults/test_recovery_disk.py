"""What the Training server promises when its disk fails or is full."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

import tinsmith
from clusters import until_health
from faults.processes import Training
from faults.recovering import STEPS, Seen, model_of, state, train
from tinsmith import v1 as pb
from wire import reason_and_field


def test_row_28_a_disk_that_fails_refuses_calls_and_says_so(
    training: Training, undisturbed: Seen
) -> None:
    """UNAVAILABLE without effect, health NOT_SERVING, reading goes on; a server whose disk works
    again goes on, bit for bit."""
    training.start_rank()
    client = model_of(tinsmith.ServiceClient(base_url=training.address))
    seen = train(client, 0, 2)
    training.restart_server(env={"TINSMITH_FAILPOINTS": "wal_append:io"})
    with grpc.insecure_channel(training.address) as channel:
        stub = pb.TrainingServiceStub(channel)
        request = pb.OptimStepRequest(model_id=client.model_id, seq_id=5)
        with pytest.raises(grpc.RpcError) as refusal:
            stub.OptimStep(request, timeout=60)
    assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
    assert reason_and_field(refusal.value)[0] == "STORAGE_UNAVAILABLE"
    until_health(training.address, serving=False)
    assert state(training, client.model_id).next_seq_id == 5
    training.restart_server()
    assert seen + train(client, 2, 2 * STEPS) == undisturbed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 32 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("NO SMALL DISK HERE: only root may mount one; disk full was not tested")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_row_27_a_full_disk_refuses_calls_and_recovers(
    tiny_model: Path, tmp_path: Path, small_disk: Path, undisturbed: Seen
) -> None:
    """New calls are RESOURCE_EXHAUSTED with RetryInfo and have no effect, although the ranks may
    have begun; reading goes on, health says so; when there is room again everything goes on, bit
    for bit."""
    with Training(tiny_model, tmp_path, data_folder=small_disk / "data") as training:
        training.start_rank()
        service = tinsmith.ServiceClient(base_url=training.address)
        client = model_of(service)
        seen = train(client, 0, 2)
        _fill(small_disk / "filler")
        stub = pb.TrainingServiceStub(grpc.insecure_channel(training.address))
        first = state(training, client.model_id).next_seq_id
        answers, refusal = _until_refused(stub, client.model_id, first)
        refused = state(training, client.model_id).next_seq_id  # reading works
        assert refused == first + len(answers)
        none, refusal_again = _until_refused(stub, client.model_id, refused)
        assert none == []
        for error in (refusal, refusal_again):
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert reason_and_field(error)[0] == "STORAGE_FULL"
        until_health(training.address, serving=False)
        (small_disk / "filler").unlink()
        until_health(training.address, serving=True)
        answers += [_call(stub, client.model_id, refused + more) for more in range(4)]
        twin = model_of(service)
        assert train(twin, 0, 2) == seen == undisturbed[:4]
        assert answers == [
            _call(stub, twin.model_id, number) for number in range(first, refused + 4)
        ]


def _fill(file: Path) -> None:
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass


def _until_refused(
    stub: pb.TrainingServiceStub, model_id: str, first: int
) -> tuple[Seen, grpc.RpcError]:
    answers: Seen = []
    while len(answers) < 2000:
        try:
            answers.append(_call(stub, model_id, first + len(answers)))
        except grpc.RpcError as refusal:
            return answers, refusal
    raise AssertionError("nothing was refused")


def _call(stub: pb.TrainingServiceStub, model_id: str, seq_id: int) -> object:
    """A step under an even number, gradients under an odd one."""
    if seq_id % 2 == 0:
        adam = pb.AdamParams(learning_rate=1e-2)
        request = pb.OptimStepRequest(model_id=model_id, seq_id=seq_id, adam_params=adam)
        return dict(stub.OptimStep(request).metrics)
    tensor = pb.Tensor(dtype=pb.Dtype.DTYPE_INT64, ints=[seq_id % 200] * 64)
    datum = pb.Datum(
        model_input=pb.ModelInput(chunks=[pb.ModelInputChunk(tokens=tensor)]),
        loss_fn_inputs={
            "target_tokens": tensor,
            "weights": pb.Tensor(dtype=pb.Dtype.DTYPE_FLOAT32, floats=[1.0] * 64),
        },
    )
    call = pb.ForwardBackwardRequest(
        model_id=model_id,
        seq_id=seq_id,
        data=[datum] * 8,
        loss_fn=pb.LossFn(cross_entropy=pb.CrossEntropyLoss()),
    )
    answers = stub.ForwardBackward(iter([call]))
    return [answer.SerializeToString(deterministic=True) for answer in answers]
