"""The Training service through the wire, on the generated stubs: order, repeats, saving."""

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest

from clusters import RunningCluster
from tinsmith import tensors
from tinsmith import v1 as pb
from tinsmith.cluster import Cluster
from training_calls import (
    TOKENS,
    call,
    datum,
    forward_backward,
    logprobs,
    step,
)
from wire import reason_and_field, unlimited

# --- order and repeats ------------------------------------------------------------------------


def test_shuffled_calls_with_repeats_are_applied_once_each_in_order(stubs: Cluster) -> None:
    """20 numbered calls, shuffled, 5 of them twice, all at once: the result is that of 20 calls
    one after the other, bit for bit, and a repeat gets the same bytes."""

    def create() -> str:
        lora = pb.LoraConfig(rank=2, seed=4)
        return stubs.training.CreateModel(pb.CreateModelRequest(lora_config=lora)).model.model_id

    def send(model_id: str, seq_id: int) -> list[bytes]:
        if seq_id % 3 == 0:
            request = step(model_id, seq_id, learning_rate=0.01 * seq_id)
            return [stubs.training.OptimStep(request).SerializeToString(deterministic=True)]
        weights = np.full(5, seq_id, np.float32)
        responses = forward_backward(stubs, call(model_id, seq_id, data=[datum(weights=weights)]))
        return [r.SerializeToString(deterministic=True) for r in responses]

    calm, shuffled = create(), create()
    expected = {n: send(calm, n) for n in range(1, 21)}
    rng = random.Random(0)
    numbers = [*range(1, 21), *rng.sample(range(1, 21), 5)]
    rng.shuffle(numbers)
    with ThreadPoolExecutor(len(numbers)) as pool:
        answers = list(pool.map(lambda n: send(shuffled, n), numbers))
    for number, answer in zip(numbers, answers, strict=True):
        assert answer == expected[number], number
    np.testing.assert_array_equal(logprobs(stubs, shuffled), logprobs(stubs, calm))
    again = {n: send(shuffled, n) for n in range(1, 21)}
    assert again == expected
    np.testing.assert_array_equal(logprobs(stubs, shuffled), logprobs(stubs, calm))
    found = stubs.training.GetModel(pb.GetModelRequest(model_id=shuffled)).model
    assert found.next_seq_id == 21


def test_other_content_under_a_used_number_has_no_effect(stubs: Cluster, model: pb.Model) -> None:
    """ALREADY_EXISTS, and the model is as before."""
    forward_backward(stubs, call(model.model_id, 1))
    stubs.training.OptimStep(step(model.model_id, 2))
    before = logprobs(stubs, model.model_id)
    with pytest.raises(grpc.RpcError) as refusal:
        stubs.training.OptimStep(step(model.model_id, 2, learning_rate=0.5))
    assert refusal.value.code() == grpc.StatusCode.ALREADY_EXISTS
    assert reason_and_field(refusal.value)[0] == "SEQ_ID_CONFLICT"
    np.testing.assert_array_equal(before, logprobs(stubs, model.model_id))


def test_messages_of_one_call_may_be_cut_anywhere(stubs: Cluster, model: pb.Model) -> None:
    """The same data in one message or three are the same call."""
    data = [datum(weights=np.full(5, n, np.float32)) for n in (1, 2, 3)]
    whole = forward_backward(stubs, call(model.model_id, 1, data=data))
    parts = [pb.ForwardBackwardRequest(data=[d]) for d in data[1:]]
    cut = forward_backward(stubs, call(model.model_id, 1, data=data[:1]), *parts)
    assert whole == cut
    assert [len(response.outputs) for response in whole] == [3]
    assert set(whole[-1].metrics) == {"loss:sum"}


def test_results_go_out_in_messages_of_a_quarter_mebibyte(stubs: Cluster, model: pb.Model) -> None:
    """So many whole data in each, in order, and the metrics in the last; a repeat equals it."""
    wide = np.zeros((60, 64), np.int64)
    inputs = {"target_tokens": tensors.encode(wide)}
    tokens = tensors.encode(np.arange(60) % 50)
    data = [
        pb.Datum(
            model_input=pb.ModelInput(chunks=[pb.ModelInputChunk(tokens=tokens)]),
            loss_fn_inputs={**inputs, "weights": tensors.encode(np.full(wide.shape, n / 1e3))},
        )
        for n in range(40)
    ]
    found = forward_backward(stubs, call(model.model_id, 1, data=data))
    # 18 times 60 * 64 * 4 bytes are the first that are 256 KiB.
    assert [len(response.outputs) for response in found] == [18, 18, 4]
    assert [bool(response.metrics) for response in found] == [False, False, True]
    losses = [
        float((tensors.decode(output.loss_fn_outputs["logprobs"]) * n / -1e3).sum())
        for n, output in enumerate(output for response in found for output in response.outputs)
    ]
    assert found[-1].metrics["loss:sum"] == pytest.approx(sum(losses), rel=1e-4)
    assert found == forward_backward(stubs, call(model.model_id, 1, data=data))


def test_weights_that_are_left_out_are_ones(stubs: Cluster, model: pb.Model) -> None:
    """For (N,) and (N, K) targets, beside data that have weights: the same bits as with ones."""
    wide = np.array(TOKENS)[:, None] + np.arange(3)
    whole = [datum(), datum(target_tokens=wide, weights=np.ones((5, 3), np.float32)), datum()]
    short = [pb.Datum.FromString(each.SerializeToString()) for each in whole]
    for each in short[:2]:
        del each.loss_fn_inputs["weights"]
    answers = [forward_backward(stubs, call(model.model_id, data=data)) for data in (whole, short)]
    assert answers[0] == answers[1]
    logprobs_NK = tensors.decode(answers[1][0].outputs[1].loss_fn_outputs["logprobs"])
    assert logprobs_NK.shape == (5, 3)


def test_create_with_a_request_id_is_one_model(stubs: Cluster) -> None:
    """A repeat returns the first model; other content is refused."""
    request = pb.CreateModelRequest(
        request_id=f"r{time.time_ns()}", lora_config=pb.LoraConfig(rank=2)
    )
    first, again = (stubs.training.CreateModel(request).model for _ in range(2))
    assert first == again
    assert (first.owner, first.step_count) == ("default", 0)
    request.lora_config.rank = 3
    with pytest.raises(grpc.RpcError) as refusal:
        stubs.training.CreateModel(request)
    assert reason_and_field(refusal.value)[0] == "REQUEST_ID_CONFLICT"
    listed = stubs.training.ListModels(pb.ListModelsRequest(page_size=1))
    assert [m.model_id for m in listed.models] == [first.model_id]
    assert listed.total_size >= 1
    most = stubs.training.ListModels(pb.ListModelsRequest(page_size=2**31 - 1))  # coerced
    assert len(most.models) == most.total_size
    stubs.training.DeleteModel(pb.DeleteModelRequest(model_id=first.model_id))
    with pytest.raises(grpc.RpcError) as refusal:
        stubs.training.DeleteModel(pb.DeleteModelRequest(model_id=first.model_id))
    assert reason_and_field(refusal.value)[0] == "MODEL_NOT_FOUND"


def test_plain_numbers_in_and_out(stubs: Cluster, model: pb.Model) -> None:
    """What a person types into grpcurl: ints for tokens and weights, readable answers."""
    typed = pb.Datum(
        model_input=pb.ModelInput(chunks=[pb.ModelInputChunk(tokens=pb.Tensor(ints=TOKENS))]),
        loss_fn_inputs={
            "target_tokens": pb.Tensor(ints=[t + 1 for t in TOKENS]),
            "weights": pb.Tensor(ints=[1] * 5),
        },
    )
    plain = call(model.model_id, data=[typed], tensor_format=pb.TensorFormat.TENSOR_FORMAT_PLAIN)
    (answer,) = forward_backward(stubs, plain)
    values = answer.outputs[0].loss_fn_outputs["logprobs"].floats
    assert answer.metrics["loss:sum"] == pytest.approx(-sum(values), abs=1e-4)
    np.testing.assert_array_equal(np.float32(values), logprobs(stubs, model.model_id))


def test_a_cancelled_stream_has_no_effect(stubs: Cluster, model: pb.Model) -> None:
    """Cancelled before its last message, a call was never there: its number is free."""
    sent = threading.Event()
    release = threading.Event()

    def requests() -> Iterator[pb.ForwardBackwardRequest]:
        yield call(model.model_id, 1)
        sent.set()
        release.wait(60)

    stream = stubs.training.ForwardBackward(requests())
    assert sent.wait(60)
    time.sleep(0.2)
    stream.cancel()
    release.set()
    found = stubs.training.GetModel(pb.GetModelRequest(model_id=model.model_id)).model
    assert found.next_seq_id == 1
    assert stubs.training.OptimStep(step(model.model_id, 1)).metrics["grad_norm:last"] == 0


# --- saving and loading -----------------------------------------------------------------------


def test_save_kinds_and_names(stubs: Cluster, model: pb.Model) -> None:
    """Names are taken once per kind, unless overwritten; a nameless sampler save is ephemeral."""
    training, model_id = stubs.training, model.model_id
    forward_backward(stubs, call(model_id, 1))
    training.OptimStep(step(model_id, 2))

    def save(seq_id: int, kind: Any, name: str, **fields: Any) -> str:
        return training.SaveCheckpoint(
            pb.SaveCheckpointRequest(
                model_id=model_id, seq_id=seq_id, kind=kind, name=name, **fields
            )
        ).checkpoint_path

    path = save(3, pb.CheckpointKind.CHECKPOINT_KIND_TRAINING, "a")
    assert path == f"tinsmith://{model_id}/weights/a"
    assert save(3, pb.CheckpointKind.CHECKPOINT_KIND_TRAINING, "a") == path
    assert (
        save(4, pb.CheckpointKind.CHECKPOINT_KIND_SAMPLER, "a")
        == f"tinsmith://{model_id}/sampler_weights/a"
    )
    ephemeral = save(5, pb.CheckpointKind.CHECKPOINT_KIND_SAMPLER, "")
    assert save(5, pb.CheckpointKind.CHECKPOINT_KIND_SAMPLER, "") == ephemeral
    found = stubs.checkpoint.GetCheckpoint(
        pb.GetCheckpointRequest(checkpoint_path=ephemeral)
    ).checkpoint
    assert found.HasField("expire_time")
    forward_backward(stubs, call(model_id, 6))
    training.OptimStep(step(model_id, 7, learning_rate=0.1))
    with pytest.raises(grpc.RpcError) as refusal:
        save(8, pb.CheckpointKind.CHECKPOINT_KIND_TRAINING, "a")
    assert reason_and_field(refusal.value)[0] == "CHECKPOINT_EXISTS"
    assert save(9, pb.CheckpointKind.CHECKPOINT_KIND_TRAINING, "a", overwrite=True) == path
    after = logprobs(stubs, model_id)
    copied = training.CreateModel(
        pb.CreateModelRequest(checkpoint_path=path, with_optimizer=True)
    ).model
    np.testing.assert_array_equal(after, logprobs(stubs, copied.model_id))
    assert training.OptimStep(step(copied.model_id, 1)).metrics["step:last"] == 3
    training.DeleteModel(pb.DeleteModelRequest(model_id=copied.model_id))


def test_a_checkpoint_of_another_shape_is_refused(stubs: Cluster, model: pb.Model) -> None:
    """INCOMPATIBLE_CHECKPOINT, and the model goes on as before."""
    other = stubs.training.CreateModel(
        pb.CreateModelRequest(lora_config=pb.LoraConfig(rank=3))
    ).model.model_id
    saved = stubs.training.SaveCheckpoint(
        pb.SaveCheckpointRequest(
            model_id=other, kind=pb.CheckpointKind.CHECKPOINT_KIND_TRAINING, name="o"
        )
    )
    before = logprobs(stubs, model.model_id)
    with pytest.raises(grpc.RpcError) as refusal:
        stubs.training.LoadCheckpoint(
            pb.LoadCheckpointRequest(
                model_id=model.model_id, seq_id=1, checkpoint_path=saved.checkpoint_path
            )
        )
    assert refusal.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert reason_and_field(refusal.value)[0] == "INCOMPATIBLE_CHECKPOINT"
    np.testing.assert_array_equal(before, logprobs(stubs, model.model_id))
    stubs.training.DeleteModel(pb.DeleteModelRequest(model_id=other))


def test_capabilities_name_every_limit(stubs: Cluster, cluster: RunningCluster) -> None:
    """No limit is 0 or unsaid."""
    found = stubs.training.GetCapabilities(pb.GetCapabilitiesRequest())
    assert [m.name for m in found.base_models] == [cluster.base_model]
    assert (found.engine, found.world_size) == (pb.Engine.ENGINE_DEEPSPEED, 1)
    assert found.base_models[0].dtype == pb.Dtype.DTYPE_FLOAT32
    assert list(found.loss_fns) == [field.name for field in pb.LossFn.DESCRIPTOR.fields]
    assert found.durability_mode == pb.DurabilityMode.DURABILITY_MODE_FSYNC
    assert not unlimited(found.limits)
    assert found.replay_check == pb.ReplayCheck.REPLAY_CHECK_EXACT
