"""The Training service through the wire, on the generated stubs: order, repeats, bad input."""

import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

from clusters import RunningCluster
from tinsmith import tensors
from tinsmith import v1 as pb
from tinsmith.cluster import Cluster
from wire import limit_values, reason_and_field

TOKENS = [5, 6, 7, 8, 9]


@pytest.fixture
def model(stubs: Cluster) -> Iterator[pb.Model]:
    """A fresh model, deleted afterwards."""
    lora = pb.LoraConfig(rank=2, seed=1)
    created = stubs.training.CreateModel(pb.CreateModelRequest(lora_config=lora)).model
    yield created
    stubs.training.DeleteModel(pb.DeleteModelRequest(model_id=created.model_id))


def tokens_of(values: Iterable[int]) -> pb.ModelInput:
    return pb.ModelInput(chunks=[pb.ModelInputChunk(tokens=tensors.encode(list(values)))])


def datum(**inputs: Any) -> pb.Datum:
    arrays = {"target_tokens": np.array(TOKENS) + 1, "weights": np.ones(5, np.float32), **inputs}
    packed = {k: v if isinstance(v, pb.Tensor) else tensors.encode(v) for k, v in arrays.items()}
    return pb.Datum(model_input=tokens_of(TOKENS), loss_fn_inputs=packed)


CROSS_ENTROPY = pb.LossFn(cross_entropy=pb.CrossEntropyLoss())


def call(model_id: str, seq_id: int = 0, **fields: Any) -> pb.ForwardBackwardRequest:
    filled = {"loss_fn": CROSS_ENTROPY, "data": [datum()], **fields}
    return pb.ForwardBackwardRequest(model_id=model_id, seq_id=seq_id, **filled)


def forward_backward(
    stubs: Cluster, *messages: pb.ForwardBackwardRequest
) -> list[pb.ForwardBackwardResponse]:
    return list(stubs.training.ForwardBackward(iter(messages)))


def step(model_id: str, seq_id: int, **adam: float) -> pb.OptimStepRequest:
    params = pb.AdamParams(**adam) if adam else None
    return pb.OptimStepRequest(model_id=model_id, seq_id=seq_id, adam_params=params)


def logprobs(stubs: Cluster, model_id: str) -> np.ndarray:
    responses = stubs.training.Forward(
        iter([pb.ForwardRequest(model_id=model_id, loss_fn=CROSS_ENTROPY, data=[datum()])])
    )
    outputs = [output for response in responses for output in response.outputs]
    return tensors.decode(outputs[0].loss_fn_outputs["logprobs"])


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
        release.wait(10)

    stream = stubs.training.ForwardBackward(requests())
    assert sent.wait(10)
    time.sleep(0.2)
    stream.cancel()
    release.set()
    found = stubs.training.GetModel(pb.GetModelRequest(model_id=model.model_id)).model
    assert found.next_seq_id == 1
    assert stubs.training.OptimStep(step(model.model_id, 1)).metrics["grad_norm:last"] == 0


# --- bad input --------------------------------------------------------------------------------

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
    "missing weights": (without("weights"), "MISSING_FIELD", W),
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
        stubs.training.ForwardBackward(iter([request]), timeout=5).__next__()
    assert refusal.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert reason_and_field(refusal.value) == (reason, field)
    assert str(field).split("[")[0].split(".")[0] in refusal.value.details()
    number = 2 if request.seq_id > 0 else 1
    metrics = stubs.training.OptimStep(step(model.model_id, number), timeout=5).metrics
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
            list(rpc(iter([b"\xff\xff\xff"]), timeout=5))
        assert refusal.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as refusal:
            list(rpc(iter([b"\0" * (33 * 1024 * 1024)]), timeout=20))
        assert refusal.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert reason_and_field(refusal.value)[0] == "MESSAGE_TOO_LARGE"
        assert "message_bytes_max is 33554432" in refusal.value.details()
        with pytest.raises(grpc.RpcError) as refusal:
            list(rpc(iter([b"\0" * (65 * 1024 * 1024)]), timeout=20))
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


def _bad_unary(stubs: Cluster, model_id: str) -> dict[str, tuple[Callable[[], Any], str, str]]:
    training = stubs.training

    def save(**fields: Any) -> Callable[[], Any]:
        filled = {"kind": pb.CheckpointKind.CHECKPOINT_KIND_TRAINING, "name": "x", **fields}
        return lambda: training.SaveCheckpoint(
            pb.SaveCheckpointRequest(model_id=model_id, **filled), timeout=5
        )

    def load(path: str, **fields: Any) -> Callable[[], Any]:
        request = pb.LoadCheckpointRequest(model_id=model_id, checkpoint_path=path, **fields)
        return lambda: training.LoadCheckpoint(request, timeout=5)

    def create(**fields: Any) -> Callable[[], Any]:
        return lambda: training.CreateModel(pb.CreateModelRequest(**fields), timeout=5)

    def adam(**fields: float) -> Callable[[], Any]:
        return lambda: training.OptimStep(step(model_id, 0, **fields), timeout=5)

    lora = pb.LoraConfig
    no_targets = lora(train_attn=False, train_mlp=False, train_unembed=False)
    absent = "tinsmith://absent/weights/absent"
    return {
        "lr NaN": (adam(learning_rate=NAN), "NON_FINITE", "adam_params.learning_rate"),
        "lr negative": (adam(learning_rate=-1), "INVALID_FIELD", "adam_params.learning_rate"),
        "beta1 one": (adam(beta1=1), "INVALID_FIELD", "adam_params.beta1"),
        "eps infinite": (adam(eps=INF), "NON_FINITE", "adam_params.eps"),
        "clip negative": (adam(grad_clip_norm=-1), "INVALID_FIELD", "adam_params.grad_clip_norm"),
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
        "absent checkpoint": (load(absent), "CHECKPOINT_NOT_FOUND", ""),
        "wrong kind": (
            load(absent.replace("weights", "sampler_weights")),
            "WRONG_CHECKPOINT_KIND",
            "",
        ),
        "rank negative": (create(lora_config=lora(rank=-1)), "INVALID_FIELD", "lora_config.rank"),
        "rank too large": (
            create(lora_config=lora(rank=257)),
            "LIMIT_EXCEEDED",
            "lora_config.rank",
        ),
        "alpha NaN": (create(lora_config=lora(alpha=NAN)), "NON_FINITE", "lora_config.alpha"),
        "no targets": (create(lora_config=no_targets), "INVALID_FIELD", "lora_config"),
        "base model": (create(base_model="absent"), "BASE_MODEL_NOT_FOUND", ""),
        "from absent": (create(checkpoint_path=absent), "CHECKPOINT_NOT_FOUND", ""),
        "both": (
            create(checkpoint_path=absent, lora_config=lora(rank=2)),
            "INVALID_FIELD",
            "lora_config",
        ),
        "optimizer of nothing": (create(with_optimizer=True), "MISSING_FIELD", "checkpoint_path"),
        "request id": (create(request_id="r" * 129), "LIMIT_EXCEEDED", "request_id"),
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
    for case, (send, reason, field) in _bad_unary(stubs, model.model_id).items():
        with pytest.raises(grpc.RpcError) as refusal:
            send()
        assert reason_and_field(refusal.value) == (reason, field), case
    assert forward_backward(stubs, call(model.model_id, 1))


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
    assert all(value > 0 for value in limit_values(found.limits).values())
