"""What the Training service refuses of calls: the reason and the field of each refusal."""

from collections.abc import Callable, Iterable
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

from clusters import RunningCluster
from tinsmith import v1 as pb
from tinsmith.cluster import Cluster
from training_calls import CROSS_ENTROPY, call, datum, forward_backward, step, tokens_of
from wire import reason_and_field

NAN, INF = float("nan"), float("inf")
W, T = 'data[0].loss_fn_inputs["weights"]', 'data[0].loss_fn_inputs["target_tokens"]'
RL = {"logprobs": np.zeros(5, np.float32), "advantages": np.ones(5, np.float32)}


def one(**inputs: Any) -> dict[str, Any]:
    return {"data": [datum(**inputs)]}


def without(name: str) -> dict[str, Any]:
    bad = datum()
    del bad.loss_fn_inputs[name]
    return {"data": [bad]}


def reads(values: Iterable[int]) -> dict[str, Any]:
    bad = datum()
    bad.model_input.CopyFrom(tokens_of(values))
    return {"data": [bad]}


def loss(**kwargs: Any) -> dict[str, Any]:
    return {"loss_fn": pb.LossFn(**kwargs)}


def raw(**fields: Any) -> pb.Tensor:
    return pb.Tensor(**fields)


BAD_CALLS: dict[str, tuple[dict[str, Any], str, str]] = {
    "empty data": ({"data": []}, "MISSING_FIELD", "data"),
    "weights too short": (one(weights=np.ones(4, np.float32)), "INVALID_SHAPE", W),
    "weights of rank 2": (one(weights=np.ones((5, 1), np.float32)), "INVALID_SHAPE", W),
    "inexact integer weights": (one(weights=np.full(5, 2**24 + 1)), "INVALID_FIELD", W),
    "float targets": (one(target_tokens=np.ones(5, np.float32)), "INVALID_DTYPE", T),
    "targets too long": (one(target_tokens=np.ones(6, np.int64)), "INVALID_SHAPE", T),
    "65 dimensions": (one(weights=raw(floats=[1] * 5, shape=[1] * 64 + [5])), "INVALID_SHAPE", W),
    "empty and endless": (one(weights=raw(shape=[0, 2**62])), "INVALID_SHAPE", W),
    "targets of rank 3": (one(target_tokens=np.ones((5, 1, 1), np.int64)), "INVALID_SHAPE", T),
    "too many targets": (
        one(target_tokens=np.ones((5, 65), np.int64), weights=np.ones((5, 65), np.float32)),
        "LIMIT_EXCEEDED",
        T,
    ),
    "NaN weight": (one(weights=np.float32([1, NAN, 1, 1, 1])), "NON_FINITE", W),
    "infinite weight": (one(weights=np.float32([1, 1, INF, 1, 1])), "NON_FINITE", W),
    "missing targets": (without("target_tokens"), "MISSING_FIELD", T),
    "unknown input": (
        one(mask=np.ones(5, np.float32)),
        "UNKNOWN_LOSS_INPUT",
        'data[0].loss_fn_inputs["mask"]',
    ),
    "token above the vocabulary": (
        reads([1, 2, 3, 4, 10**6]),
        "TOKEN_OUT_OF_RANGE",
        "data[0].model_input",
    ),
    "negative token": (reads([1, -2, 3, 4, 5]), "TOKEN_OUT_OF_RANGE", "data[0].model_input"),
    "target outside": (one(target_tokens=np.int64([1, 2, 3, 4, 320])), "TOKEN_OUT_OF_RANGE", T),
    "too many tokens": (reads(np.ones(513, int)), "LIMIT_EXCEEDED", "data[0].model_input"),
    "no token": (reads([]), "MISSING_FIELD", "data[0].model_input.chunks"),
    "no chunk": (
        {"data": [pb.Datum(loss_fn_inputs=dict(datum().loss_fn_inputs))]},
        "MISSING_FIELD",
        "data[0].model_input.chunks",
    ),
    "unset chunk": (
        {"data": [pb.Datum(model_input=pb.ModelInput(chunks=[pb.ModelInputChunk()]))]},
        "MISSING_FIELD",
        "data[0].model_input.chunks[0]",
    ),
    "shape without its values": (
        one(weights=raw(dtype=pb.Dtype.DTYPE_FLOAT32, shape=[5], data=b"\0" * 16)),
        "INVALID_SHAPE",
        W,
    ),
    "half a value": (
        one(weights=raw(dtype=pb.Dtype.DTYPE_FLOAT32, data=b"\0" * 7)),
        "INVALID_SHAPE",
        W,
    ),
    "negative shape": (
        one(weights=raw(dtype=pb.Dtype.DTYPE_FLOAT32, shape=[-1, -5], data=b"\0" * 20)),
        "INVALID_SHAPE",
        W,
    ),
    "huge shape": (
        one(weights=raw(dtype=pb.Dtype.DTYPE_FLOAT32, shape=[2**40, 2**40], data=b"\0" * 20)),
        "INVALID_SHAPE",
        W,
    ),
    "bytes without dtype": (one(weights=raw(data=b"\0" * 20)), "INVALID_DTYPE", W),
    "unknown dtype": (one(weights=raw(dtype=99, data=b"\0" * 20)), "INVALID_DTYPE", W),
    "bytes and numbers": (
        one(weights=raw(dtype=pb.Dtype.DTYPE_FLOAT32, data=b"\0" * 20, floats=[1] * 5)),
        "INVALID_FIELD",
        W,
    ),
    "no loss": ({"loss_fn": None}, "MISSING_FIELD", "loss_fn"),
    "empty loss": ({"loss_fn": pb.LossFn()}, "MISSING_FIELD", "loss_fn"),
    "inputs of another loss": (
        loss(importance_sampling=pb.ImportanceSamplingLoss()),
        "UNKNOWN_LOSS_INPUT",
        W,
    ),
    "NaN threshold": (
        loss(ppo=pb.PpoLoss(clip_low_threshold=NAN)),
        "NON_FINITE",
        "loss_fn.ppo.clip_low_threshold",
    ),
    "crossed thresholds": (
        loss(ppo=pb.PpoLoss(clip_low_threshold=2, clip_high_threshold=1)),
        "INVALID_FIELD",
        "loss_fn.ppo.clip_high_threshold",
    ),
    "negative beta": (loss(dro=pb.DroLoss(beta=-1)), "INVALID_FIELD", "loss_fn.dro.beta"),
    "unknown format": ({"tensor_format": 77}, "INVALID_FIELD", "tensor_format"),
    "negative number": ({"seq_id": -1}, "INVALID_FIELD", "seq_id"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_data_are_refused_with_the_field(stubs: Cluster, model: pb.Model, case: str) -> None:
    """Typed error, exact field; the number is used up, nothing was added, the next call works."""
    fields, reason, field = BAD_CALLS[case]
    request = call(model.model_id, **{"seq_id": 1, **fields})
    with pytest.raises(grpc.RpcError) as refusal:
        stubs.training.ForwardBackward(iter([request]), timeout=60).__next__()
    assert refusal.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert reason_and_field(refusal.value) == (reason, field)
    assert str(field).split("[")[0].split(".")[0] in refusal.value.details()
    number = 2 if request.seq_id > 0 else 1
    metrics = stubs.training.OptimStep(step(model.model_id, number), timeout=60).metrics
    assert metrics["grad_norm:last"] == 0


def test_the_second_datum_is_named_by_its_index(stubs: Cluster, model: pb.Model) -> None:
    """Across messages, too."""
    bad = datum(weights=np.ones(4, np.float32))
    with pytest.raises(grpc.RpcError) as refusal:
        forward_backward(stubs, call(model.model_id), pb.ForwardBackwardRequest(data=[bad]))
    assert reason_and_field(refusal.value)[1] == 'data[1].loss_fn_inputs["weights"]'


def test_malformed_streams(stubs: Cluster, cluster: RunningCluster, model: pb.Model) -> None:
    """No message, a second header, bytes that are no message, too many data."""
    with pytest.raises(grpc.RpcError) as refusal:
        forward_backward(stubs)
    assert reason_and_field(refusal.value) == ("MALFORMED_STREAM", "")
    with pytest.raises(grpc.RpcError) as refusal:
        forward_backward(stubs, call(model.model_id), call(model.model_id))
    assert reason_and_field(refusal.value) == ("MALFORMED_STREAM", "model_id")
    # In several messages: one of them may hold fewer items than a call may hold data.
    parts = [pb.ForwardBackwardRequest(data=[datum()] * 4096) for _ in range(17)]
    with pytest.raises(grpc.RpcError) as refusal:
        forward_backward(stubs, call(model.model_id), *parts)
    assert reason_and_field(refusal.value) == ("LIMIT_EXCEEDED", "data")
    with grpc.insecure_channel(cluster.address) as channel:
        rpc = channel.stream_stream("/tinsmith.v1.TrainingService/ForwardBackward")
        with pytest.raises(grpc.RpcError) as refusal:
            list(rpc(iter([b"\xff\xff\xff"]), timeout=60))
        assert refusal.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as refusal:
            list(rpc(iter([b"\0" * (33 * 1024 * 1024)]), timeout=60))
        assert refusal.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert reason_and_field(refusal.value)[0] == "MESSAGE_TOO_LARGE"
        assert "message_bytes_max is 33554432" in refusal.value.details()
        with pytest.raises(grpc.RpcError) as refusal:
            list(rpc(iter([b"\0" * (65 * 1024 * 1024)]), timeout=60))
        assert refusal.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert forward_backward(stubs, call(model.model_id))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_id", "m"),
        ("seq_id", 1),
        ("loss_fn", CROSS_ENTROPY),
        ("tensor_format", pb.TensorFormat.TENSOR_FORMAT_PACKED),
    ],
)
def test_a_field_of_the_header_in_a_later_message_is_refused(
    stubs: Cluster, model: pb.Model, field: str, value: Any
) -> None:
    """By its name, with data or without, and nothing was done; the number is used (ADR 17)."""
    for seq_id, data in enumerate(([], [datum()]), 1):
        later = pb.ForwardBackwardRequest(data=data, **{field: value})
        with pytest.raises(grpc.RpcError) as refusal:
            forward_backward(stubs, call(model.model_id, seq_id), later)
        assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert reason_and_field(refusal.value) == ("MALFORMED_STREAM", field)
    assert stubs.training.OptimStep(step(model.model_id, 3)).metrics["grad_norm:last"] == 0


Refusals = dict[str, tuple[Callable[[], Any], str, str]]
"""By name of the case: a call, and the reason and the field of its refusal."""
ABSENT = "tinsmith://absent/weights/absent"


def _bad_steps(stubs: Cluster, model_id: str) -> Refusals:
    def adam(**fields: float) -> Callable[[], Any]:
        return lambda: stubs.training.OptimStep(step(model_id, 0, **fields), timeout=60)

    return {
        "lr NaN": (adam(learning_rate=NAN), "NON_FINITE", "adam_params.learning_rate"),
        "lr negative": (adam(learning_rate=-1), "INVALID_FIELD", "adam_params.learning_rate"),
        "beta1 one": (adam(beta1=1), "INVALID_FIELD", "adam_params.beta1"),
        "eps infinite": (adam(eps=INF), "NON_FINITE", "adam_params.eps"),
        "clip negative": (adam(grad_clip_norm=-1), "INVALID_FIELD", "adam_params.grad_clip_norm"),
    }


def _bad_saves_and_loads(stubs: Cluster, model_id: str) -> Refusals:
    def save(**fields: Any) -> Callable[[], Any]:
        filled = {"kind": pb.CheckpointKind.CHECKPOINT_KIND_TRAINING, "name": "x", **fields}
        return lambda: stubs.training.SaveCheckpoint(
            pb.SaveCheckpointRequest(model_id=model_id, **filled), timeout=5
        )

    def load(path: str, **fields: Any) -> Callable[[], Any]:
        request = pb.LoadCheckpointRequest(model_id=model_id, checkpoint_path=path, **fields)
        return lambda: stubs.training.LoadCheckpoint(request, timeout=60)

    return {
        "no kind": (save(kind=0), "MISSING_FIELD", "kind"),
        "no name": (save(name=""), "INVALID_NAME", "name"),
        "dots": (save(name=".."), "INVALID_NAME", "name"),
        "absolute": (save(name="/etc/passwd"), "INVALID_NAME", "name"),
        "NUL": (save(name="a\0b"), "INVALID_NAME", "name"),
        "4 KiB": (save(name="a" * 4096), "INVALID_NAME", "name"),
        "ttl": (save(ttl=Duration()), "INVALID_FIELD", "ttl"),
        "ttl of less than a second": (
            save(ttl=Duration(seconds=1, nanos=1)),
            "INVALID_FIELD",
            "ttl",
        ),
        "metadata": (save(user_metadata={"": "x"}), "INVALID_FIELD", "user_metadata"),
        "no path": (load(""), "MISSING_FIELD", "checkpoint_path"),
        "bad path": (load("tinsmith://a/../b"), "INVALID_NAME", "checkpoint_path"),
        "absent checkpoint": (load(ABSENT), "CHECKPOINT_NOT_FOUND", ""),
        "wrong kind": (
            load(ABSENT.replace("weights", "sampler_weights")),
            "WRONG_CHECKPOINT_KIND",
            "",
        ),
    }


def _bad_creations(stubs: Cluster) -> Refusals:
    def create(**fields: Any) -> Callable[[], Any]:
        return lambda: stubs.training.CreateModel(pb.CreateModelRequest(**fields), timeout=60)

    lora = pb.LoraConfig
    no_targets = lora(train_attn=False, train_mlp=False, train_unembed=False)
    return {
        "rank negative": (create(lora_config=lora(rank=-1)), "INVALID_FIELD", "lora_config.rank"),
        "rank of experts": (
            create(lora_config=lora(rank=4, expert_rank=5)),
            "INVALID_FIELD",
            "lora_config.expert_rank",
        ),
        "no experts": (
            create(lora_config=lora(rank=4, expert_rank=2)),
            "INVALID_FIELD",
            "lora_config.expert_rank",
        ),
        "rank too large": (
            create(lora_config=lora(rank=257)),
            "LIMIT_EXCEEDED",
            "lora_config.rank",
        ),
        "alpha NaN": (create(lora_config=lora(alpha=NAN)), "NON_FINITE", "lora_config.alpha"),
        "no targets": (create(lora_config=no_targets), "INVALID_FIELD", "lora_config"),
        "base model": (create(base_model="absent"), "BASE_MODEL_NOT_FOUND", ""),
        "from absent": (create(checkpoint_path=ABSENT), "CHECKPOINT_NOT_FOUND", ""),
        "both": (
            create(checkpoint_path=ABSENT, lora_config=lora(rank=2)),
            "INVALID_FIELD",
            "lora_config",
        ),
        "optimizer of nothing": (create(with_optimizer=True), "MISSING_FIELD", "checkpoint_path"),
        "request id": (create(request_id="r" * 129), "LIMIT_EXCEEDED", "request_id"),
    }


def _bad_lists_and_models(stubs: Cluster) -> Refusals:
    training = stubs.training
    return {
        "page size": (
            lambda: training.ListModels(pb.ListModelsRequest(page_size=-1)),
            "INVALID_FIELD",
            "page_size",
        ),
        "page token": (
            lambda: training.ListModels(pb.ListModelsRequest(page_token="x")),
            "INVALID_FIELD",
            "page_token",
        ),
        "unknown model": (
            lambda: training.OptimStep(step("absent", 1)),
            "MODEL_NOT_FOUND",
            "",
        ),
        "unknown model in a stream": (
            lambda: forward_backward(stubs, call("absent", 1)),
            "MODEL_NOT_FOUND",
            "",
        ),
    }


def test_bad_unary_calls_are_refused_with_the_field(stubs: Cluster, model: pb.Model) -> None:
    """Every row of the table; afterwards the model still works."""
    cases = {
        **_bad_steps(stubs, model.model_id),
        **_bad_saves_and_loads(stubs, model.model_id),
        **_bad_creations(stubs),
        **_bad_lists_and_models(stubs),
    }
    for case, (send, reason, field) in cases.items():
        with pytest.raises(grpc.RpcError) as refusal:
            send()
        assert reason_and_field(refusal.value) == (reason, field), case
    assert forward_backward(stubs, call(model.model_id, 1))
