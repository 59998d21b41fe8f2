"""What one tenant may have of a cluster: at each limit a call passes, one above is refused."""

import time
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from faults.processes import hung
from keyed import LIMITS, TRAINING, Keyed
from tinsmith import v1 as pb
from tinsmith.status import status_of
from training_calls import call, forward_backward, tokens_of
from wire import reason_and_field


def refusal(error: grpc.RpcError) -> tuple[str, str, float]:
    """Reason, limit and delay."""
    status = status_of(error)
    assert status is not None
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in status.details:
        for message in (info, retry):
            if detail.Is(message.DESCRIPTOR):
                detail.Unpack(message)
    return info.reason, info.metadata["limit"], retry.retry_delay.ToNanoseconds() / 1e9


def over(limit: str, action: Any) -> None:
    """An action that is one too much of a tenant."""
    with pytest.raises(grpc.RpcError) as refused:
        action()
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    reason, named, delay_s = refusal(refused.value)
    assert (reason, named) == ("QUOTA_EXCEEDED", limit)
    assert delay_s > 0


def test_a_tenant_has_so_many_models(keyed: Keyed) -> None:
    """One passes, another does not; after a delete another does."""
    made = keyed.create("few")
    over("tenant_models_max", lambda: keyed.create("few"))
    keyed.stubs("few").training.DeleteModel(pb.DeleteModelRequest(model_id=made))
    keyed.create("few")


def test_a_tenant_has_so_many_bytes_of_calls_waiting(keyed: Keyed) -> None:
    """A call of more bytes than may wait is refused, and uses no number."""
    model_id, stubs = keyed.create("queued"), keyed.stubs("queued")
    big = call(model_id, 1)
    assert big.ByteSize() > LIMITS["queued"]["tenant_queued_bytes_max"]
    over("tenant_queued_bytes_max", lambda: forward_backward(stubs, big))
    asked = pb.GetModelRequest(model_id=model_id)
    assert stubs.training.GetModel(asked).model.next_seq_id == 1


def test_a_tenant_has_so_many_tokens_in_a_minute(keyed: Keyed) -> None:
    """Ten pass, and then no more; a call of more than ten never does. A repeat costs nothing."""
    model_id, stubs = keyed.create("slow"), keyed.stubs("slow")
    for seq_id in (1, 2, 1):
        forward_backward(stubs, call(model_id, seq_id))
    over("tenant_tokens_per_minute_max", lambda: forward_backward(stubs, call(model_id, 3)))
    three = call(model_id, 3)
    three.data.extend([three.data[0]] * 2)
    with pytest.raises(grpc.RpcError) as refused:
        forward_backward(stubs, three)
    assert reason_and_field(refused.value) == ("LIMIT_EXCEEDED", "data")
    asked = pb.GetModelRequest(model_id=model_id)
    assert stubs.training.GetModel(asked).model.next_seq_id == 4  # it is never good, so it is used
    params = pb.SamplingParams(max_tokens=2)
    request = pb.SampleRequest(prompt=tokens_of([1, 2, 3]), sampling_params=params, num_samples=2)
    list(stubs.sampler.Sample(request))  # seven tokens, of ten that there are at the Sampler
    over("tenant_tokens_per_minute_max", lambda: list(stubs.sampler.Sample(request)))


def test_a_tenant_has_so_many_bytes_stored(keyed: Keyed) -> None:
    """A save that would be more is refused, and its number is free."""
    model_id, stubs = keyed.create("stored"), keyed.stubs("stored")
    request = pb.SaveCheckpointRequest(model_id=model_id, seq_id=1, name="s", kind=TRAINING)
    over("tenant_stored_bytes_max", lambda: stubs.training.SaveCheckpoint(request))
    assert not stubs.checkpoint.ListCheckpoints(pb.ListCheckpointsRequest()).total_size
    asked = pb.GetModelRequest(model_id=model_id)
    assert stubs.training.GetModel(asked).model.next_seq_id == 1


def test_a_tenant_has_so_many_samples_at_once(keyed: Keyed) -> None:
    """While one is made another is refused; then it is not."""
    stubs = keyed.stubs("single")
    params = pb.SamplingParams(max_tokens=400, stop=pb.StopCondition(), seed=1)
    long = pb.SampleRequest(prompt=tokens_of([1, 2, 3]), sampling_params=params, num_samples=8)
    short = pb.SampleRequest(
        prompt=tokens_of([1, 2, 3]), sampling_params=pb.SamplingParams(max_tokens=1), num_samples=1
    )
    with hung(keyed.cluster.pid("sampler")):  # so that both come at once, one after the other
        stream, beside = stubs.sampler.Sample(long), stubs.sampler.Sample(short)
    over("tenant_samples_max", lambda: list(beside))
    stream.cancel()
    until = time.monotonic() + 30
    while True:
        try:
            assert list(stubs.sampler.Sample(short))
            return
        except grpc.RpcError:
            assert time.monotonic() < until
            time.sleep(0.05)
