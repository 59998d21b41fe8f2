"""Calls that were accepted are made, whoever dies, though nobody sends them again."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from answers import LOSS, WAIT_S, data_of
from clusters import until_health
from faults.processes import Training
from tinsmith import v1 as pb
from wire import reason_and_field

DIGEST = "tinsmith-call-digest-bin"
LORA = pb.LoraConfig(rank=2, seed=1)
CALLS = 5


@pytest.fixture
def training(tiny_model: Path, tmp_path: Path) -> Iterator[Training]:
    """A Training server that gives missing calls much time."""
    with Training(tiny_model, tmp_path, gap_wait_s_max=300) as running:
        yield running


def create(channel: grpc.Channel) -> str:
    request = pb.CreateModelRequest(lora_config=LORA)
    return pb.TrainingServiceStub(channel).CreateModel(request, timeout=WAIT_S).model.model_id


def compute(model_id: str, seq_id: int, **fields: Any) -> pb.ForwardBackwardRequest:
    return pb.ForwardBackwardRequest(
        model_id=model_id, seq_id=seq_id, loss_fn=LOSS, data=data_of(seq_id + 1), **fields
    )


def step(model_id: str, seq_id: int) -> pb.OptimStepRequest:
    adam = pb.AdamParams(learning_rate=0.01 * seq_id)
    return pb.OptimStepRequest(model_id=model_id, seq_id=seq_id, adam_params=adam)


def accept(channel: grpc.Channel, model_id: str, seq_id: int) -> bytes:
    """Send a call, even numbers steps, until it is accepted; returns its digest."""
    if seq_id % 2:
        request = compute(model_id, seq_id, acknowledge=True)
        stream = pb.TrainingServiceStub(channel).ForwardBackward(iter([request]), timeout=WAIT_S)
        first = next(stream)
        assert first == pb.ForwardBackwardResponse(accepted=True)
        metadata = stream.initial_metadata()
    else:
        # The stub's own method has the initial metadata only with the response.
        early = channel.unary_stream(
            "/tinsmith.v1.TrainingService/OptimStep",
            request_serializer=pb.OptimStepRequest.SerializeToString,
            response_deserializer=pb.OptimStepResponse.FromString,
        )
        metadata = early(step(model_id, seq_id), timeout=WAIT_S).initial_metadata()
    digest: bytes = dict(metadata)[DIGEST]
    return digest


def answers(channel: grpc.Channel, model_id: str, digests: Sequence[bytes] = ()) -> list[Any]:
    """What GetAnswer says of all calls."""
    found = []
    for seq_id in range(1, CALLS + 1):
        digest = digests[seq_id - 1] if digests else b""
        request = pb.GetAnswerRequest(model_id=model_id, seq_id=seq_id, call_digest=digest)
        found.append(list(pb.TrainingServiceStub(channel).GetAnswer(request, timeout=WAIT_S)))
    return found


def steps(channel: grpc.Channel, model_id: str) -> list[Any]:
    """What ListSteps says, but for the times."""
    found = pb.TrainingServiceStub(channel).ListSteps(pb.ListStepsRequest(model_id=model_id))
    assert len(found.steps) == CALLS // 2
    return [(step.seq_id, step.step_count, dict(step.metrics)) for step in found.steps]


def test_accepted_calls_are_made_after_kills_though_nobody_sends_them_again(
    training: Training,
) -> None:
    """The later ones are accepted while the first is missing; kill -9 to the Training server right
    after that, and right after the first one was accepted, while there are no ranks; then the same
    answers as without all that, and each call was made once."""
    rank = training.start_rank(engine="reference")
    until_health(training.address, serving=True)
    with grpc.insecure_channel(training.address) as channel:
        twin, model_id = create(channel), create(channel)
        for seq_id in range(1, CALLS + 1):
            accept(channel, twin, seq_id)
        expected = answers(channel, twin)
        history = steps(channel, twin)
        rank.kill()
        digests = {seq_id: accept(channel, model_id, seq_id) for seq_id in (3, 5, 2, 4)}
        training.restart_server()
    with grpc.insecure_channel(training.address) as channel:
        model = (
            pb.TrainingServiceStub(channel).GetModel(pb.GetModelRequest(model_id=model_id)).model
        )
        assert (model.next_seq_id, model.pending_calls) == (1, CALLS - 1)
        digests[1] = accept(channel, model_id, 1)
        training.restart_server()
    training.start_rank(engine="reference")
    with grpc.insecure_channel(training.address) as channel:
        found = answers(channel, model_id, [digests[seq_id] for seq_id in range(1, CALLS + 1)])
        assert found == expected
        model = (
            pb.TrainingServiceStub(channel).GetModel(pb.GetModelRequest(model_id=model_id)).model
        )
        assert (model.next_seq_id, model.step_count) == (CALLS + 1, CALLS // 2)
        assert steps(channel, model_id) == history


def test_an_accepted_call_whose_predecessor_never_comes_is_given_up(training: Training) -> None:
    """After a restart, too, it waits `gap_wait_max`; then its number is free, and another restart
    does not bring it back."""
    training.start_rank(engine="reference")
    until_health(training.address, serving=True)
    with grpc.insecure_channel(training.address) as channel:
        model_id = create(channel)
        accept(channel, model_id, 2)
        training.restart_server(gap_wait_s_max=1.0)
    for _ in range(2):
        with grpc.insecure_channel(training.address) as channel:
            asked = pb.GetAnswerRequest(model_id=model_id, seq_id=2)
            with pytest.raises(grpc.RpcError) as refusal:
                list(pb.TrainingServiceStub(channel).GetAnswer(asked, timeout=WAIT_S))
            assert reason_and_field(refusal.value)[0] in ("SEQ_ID_GAP", "CALL_NOT_FOUND")
            training.restart_server()
    with grpc.insecure_channel(training.address) as channel:
        model = (
            pb.TrainingServiceStub(channel).GetModel(pb.GetModelRequest(model_id=model_id)).model
        )
        assert (model.next_seq_id, model.pending_calls) == (1, 0)
