"""GetAnswer through the wire: a call's answer again, or as it comes, without sending the call."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

import tinsmith
from answers import LOSS, WAIT_S, answer, calls_of, data_of
from clusters import RunningCluster
from cutting_proxy import CuttingProxy
from tinsmith import _calls, tensors, types
from tinsmith import v1 as pb
from tinsmith.cluster import Cluster
from wire import reason_and_field

LARGE = 400
"""Data of a call of some hundred kilobytes."""
DIGEST = "tinsmith-call-digest-bin"


@pytest.fixture
def model_id(stubs: Cluster) -> Iterator[str]:
    """A fresh model, deleted afterwards."""
    lora = pb.LoraConfig(rank=2, seed=1)
    created = stubs.training.CreateModel(pb.CreateModelRequest(lora_config=lora)).model.model_id
    yield created
    stubs.training.DeleteModel(pb.DeleteModelRequest(model_id=created))


def refusal(stubs: Cluster, model_id: str, seq_id: int, **fields: Any) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as error:
        answer(stubs, model_id, seq_id, **fields)
    return reason_and_field(error.value)


def test_the_answer_of_every_kind_of_call_comes_again(stubs: Cluster, model_id: str) -> None:
    """The same messages as the call had, in the case of its RPC; and the format is the asker's."""
    given = calls_of(stubs, model_id)
    for seq_id, (case, messages) in enumerate(given.items(), 1):
        found = answer(stubs, model_id, seq_id)
        assert [message.WhichOneof("response") for message in found] == [case] * len(messages)
        assert [getattr(message, case) for message in found] == messages
    (plain,) = answer(stubs, model_id, 1, tensor_format=pb.TensorFormat.TENSOR_FORMAT_PLAIN)
    output = plain.forward.outputs[0].loss_fn_outputs["logprobs"]
    packed = given["forward"][0].outputs[0].loss_fn_outputs["logprobs"]
    np.testing.assert_array_equal(output.floats, tensors.decode(packed))


def test_a_large_answer_comes_in_the_same_messages(stubs: Cluster, model_id: str) -> None:
    """As many messages of the same sizes, so that a reader needs no more room than before."""
    messages = [pb.ForwardRequest(model_id=model_id, seq_id=1, loss_fn=LOSS)]
    messages += [pb.ForwardRequest(data=data_of(LARGE)) for _ in range(20)]
    given = list(stubs.training.Forward(iter(messages)))
    assert len(given) > 1
    assert [message.forward for message in answer(stubs, model_id, 1)] == given


def test_it_waits_for_a_call_that_is_under_way(stubs: Cluster, model_id: str) -> None:
    """A call that waits for its predecessor; whoever asks meanwhile gets the answer with it."""
    later = pb.ForwardRequest(model_id=model_id, seq_id=2, loss_fn=LOSS, data=data_of(2))
    call = stubs.training.Forward(iter([later]))
    digest = dict(call.initial_metadata())[DIGEST]
    found: list[pb.GetAnswerResponse] = []
    asking = threading.Thread(
        target=lambda: found.extend(answer(stubs, model_id, 2, call_digest=digest))
    )
    asking.start()
    time.sleep(0.3)
    assert not found
    stubs.training.OptimStep(pb.OptimStepRequest(model_id=model_id, seq_id=1))
    asking.join(WAIT_S)
    assert [message.forward for message in found] == list(call)


def test_what_there_is_no_answer_to_is_said_by_its_reason(stubs: Cluster, model_id: str) -> None:
    """No such call, no number, another client's content, a refused call's own error."""
    assert refusal(stubs, model_id, 1) == ("CALL_NOT_FOUND", "")
    assert refusal(stubs, model_id, 0) == ("INVALID_FIELD", "seq_id")
    assert refusal(stubs, "absent", 1) == ("MODEL_NOT_FOUND", "")
    bad = pb.OptimStepRequest(model_id=model_id, seq_id=1, adam_params=pb.AdamParams(beta1=2))
    with pytest.raises(grpc.RpcError):
        stubs.training.OptimStep(bad)
    assert refusal(stubs, model_id, 1) == ("INVALID_FIELD", "adam_params.beta1")
    stubs.training.OptimStep(pb.OptimStepRequest(model_id=model_id, seq_id=2))
    assert answer(stubs, model_id, 2)
    assert refusal(stubs, model_id, 2, call_digest=b"\0" * 32) == ("SEQ_ID_CONFLICT", "")
    assert refusal(stubs, model_id, 2, call_digest=b"\0") == ("INVALID_FIELD", "call_digest")
    assert refusal(stubs, model_id, 2, tensor_format=9) == ("INVALID_FIELD", "tensor_format")
    unknown = pb.GetAnswerRequest.FromString(
        pb.GetAnswerRequest(model_id=model_id, seq_id=2).SerializeToString() + b"\xa2\x1f\x00"
    )
    with pytest.raises(grpc.RpcError) as error:
        list(stubs.training.GetAnswer(unknown))
    assert reason_and_field(error.value) == ("INVALID_FIELD", "500")


def test_the_client_sends_a_large_call_once(
    cluster: RunningCluster, stubs: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection is cut while the call waits; it gets the answer, and no data is sent twice."""
    datum = types.Datum(
        types.ModelInput.from_ints([5, 6, 7] * 20),
        {"target_tokens": np.full(60, 3), "weights": np.ones(60, np.float32)},
    )
    receipt, digest_in = threading.Event(), _calls._digest_in

    def read(metadata: Any) -> bytes:
        receipt.set()
        return digest_in(metadata)

    monkeypatch.setattr(_calls, "_digest_in", read)
    with CuttingProxy(cluster.address) as proxy:
        service = tinsmith.ServiceClient(base_url=proxy.address)
        made = service.create_lora_training_client(cluster.base_model, rank=2, seed=1).result()
        model = stubs.training.GetModel(pb.GetModelRequest(model_id=made.model_id)).model
        client = tinsmith.TrainingClient(service._connection, model, next_seq_id=2)
        future = client.forward([datum] * LARGE, "cross_entropy")
        get = pb.GetModelRequest(model_id=made.model_id)
        while not stubs.training.GetModel(get).model.pending_calls:
            time.sleep(0.05)
        before = proxy.sent
        assert before > LARGE * 60 * 8
        assert receipt.wait(WAIT_S)
        proxy.cut()
        while not proxy.cuts:
            time.sleep(0.01)
        stubs.training.OptimStep(pb.OptimStepRequest(model_id=made.model_id, seq_id=1))
        result = future.result(WAIT_S)
        assert len(result.loss_fn_outputs) == LARGE
        assert proxy.sent - before < 20_000
        stubs.training.DeleteModel(pb.DeleteModelRequest(model_id=made.model_id))
