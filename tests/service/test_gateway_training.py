"""Training through the gateway over plain HTTP, as the stock SDK asks for it."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clusters import RunningCluster
from gateways import RunningGateway, ask, running_gateway
from sdk_calls import PATH, Sdk, call, datum, packed
from tinsmith.gateway.v1 import tinker_pb2 as tinker


@pytest.fixture
def sdk(gateway: RunningGateway) -> Sdk:
    return Sdk(gateway)


def test_a_model_is_trained_saved_and_loaded(sdk: Sdk) -> None:
    """The rows of the SDK's table, in the order of a program."""
    model_id = sdk.model()
    about = sdk.post("get_info", {"model_id": model_id})
    assert (about["lora_rank"], about["model_data"]["model_name"]) == (2, "tiny-llama")
    first = sdk.passed(sdk.post("forward_backward", call(model_id, 1)))
    (record,) = first.loss_fn_outputs
    logprobs = np.frombuffer(record.fields["logprobs"].data, "<f4")
    assert first.metrics["loss:sum"] == pytest.approx(-logprobs.sum(), abs=1e-4)
    assert all(key.count(":") == 1 for key in first.metrics)
    step = {"model_id": model_id, "seq_id": 2, "adam_params": {"learning_rate": 0.01}}
    assert sdk.result(sdk.post("optim_step", step))["metrics"]["step:last"] == 1
    again = sdk.passed(sdk.post("forward_backward", call(model_id, 3, forward_only=True)))
    assert again.metrics["loss:sum"] < first.metrics["loss:sum"]
    save = {"model_id": model_id, "seq_id": 4, "path": "s1", "ttl_seconds": 3600}
    path = sdk.result(sdk.post("save_weights", save))["path"]
    assert path == f"tinker://{model_id}/weights/s1"
    create = {"session_id": sdk.session_id, "model_seq_id": 1, "path": path, "optimizer": True}
    loaded = sdk.result(sdk.post("load_weights", create))
    assert loaded["model_id"] == f"{sdk.session_id}:train:1"
    same = sdk.passed(sdk.post("forward_backward", call(loaded["model_id"], 1, forward_only=True)))
    assert same.metrics["loss:sum"] == again.metrics["loss:sum"]
    back = {"model_id": model_id, "seq_id": 5, "path": path, "optimizer": False}
    assert sdk.result(sdk.post("load_weights", back))["path"] == path
    named = {"model_id": model_id, "seq_id": 6, "path": "w1", "kind": "snapshot"}
    path = sdk.result(sdk.post("save_weights_for_sampler", named))["path"]
    assert path == f"tinker://{model_id}/sampler_weights/w1"
    unnamed = {"model_id": model_id, "seq_id": 7, "sampling_session_seq_id": 0}
    sampler = sdk.result(sdk.post("save_weights_for_sampler", unnamed))["sampling_session_id"]
    assert sampler.startswith(f"{sdk.session_id}:sample:0:")
    assert sdk.result(sdk.post("unload_model", {"model_id": model_id}))["model_id"] == model_id
    assert sdk.asked("get_info", {"model_id": model_id})[0] == 404


def test_a_repeat_has_the_same_promise_and_is_done_once(sdk: Sdk) -> None:
    """An SDK that hears nothing sends the same number again, under another key."""
    model_id = sdk.model()
    promises = [sdk.post("forward_backward", call(model_id, 1)) for _ in range(3)]
    assert len({promise["request_id"] for promise in promises}) == 1
    step = {"model_id": model_id, "seq_id": 2, "adam_params": {"learning_rate": 0.01}}
    results = [sdk.result(sdk.post("optim_step", step)) for _ in range(3)]
    assert [result["metrics"]["step:last"] for result in results] == [1, 1, 1]
    step["adam_params"] = {"learning_rate": 0.02}
    failed = sdk.result(sdk.post("optim_step", step))
    assert failed["category"] == "user"
    assert "other content" in failed["error"]
    waiting = call(model_id, 4), call(model_id, 4, forward_only=True)
    assert sdk.asked("forward_backward", waiting[0])[0] == 200
    assert sdk.asked("forward_backward", waiting[1])[0] == 400


def test_the_first_piece_may_be_sent_last(sdk: Sdk) -> None:
    """Each has its promise at once, and they take effect in the order of their numbers."""
    model_id = sdk.model()
    later = [sdk.post("forward_backward", call(model_id, number)) for number in (3, 2)]
    step = sdk.post("optim_step", {"model_id": model_id, "seq_id": 4, "adam_params": {}})
    first = sdk.post("forward_backward", call(model_id, 1))
    losses = {sdk.passed(promise).metrics["loss:sum"] for promise in (first, *later)}
    assert len(losses) == 1
    assert sdk.result(step)["metrics"]["step:last"] == 1


WRONG: dict[str, tuple[Callable[[str], tuple[str, Any]], int, str]] = {
    "a loss that is not here": (
        lambda model: ("forward_backward", call(model, 1, loss_fn="stable_reinforce")),
        *(400, "importance_sampling"),
    ),
    "an uploaded loss": (
        lambda model: ("forward_backward", call(model, 1, loss_fn="custom")),
        *(400, "forward_backward_custom"),
    ),
    "a setting that the loss has not": (
        lambda model: (
            "forward_backward",
            call(
                model,
                1,
                loss_fn_config_v2={"beta": tinker.LossConfigValue(number=1.0)},
            ),
        ),
        *(400, "beta"),
    ),
    "an image": (
        lambda model: (
            "forward_backward",
            call(model, 1, data=[tinker.Datum(model_input=[tinker.Chunk(image={})])]),
        ),
        *(400, "only text"),
    ),
    "another optimizer": (
        lambda model: (
            "optim_step",
            {"model_id": model, "seq_id": 1, "optimizer_params": {"type": "dimuon"}},
        ),
        *(400, "adamw"),
    ),
    "no model of that name": (
        lambda model: ("forward_backward", call("s-absent:train:0", 1)),
        *(404, "s-absent"),
    ),
    "bytes that are no message": (
        lambda model: ("forward_backward", call(model, 1) + b"\xff"),
        *(400, ""),
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_refused_uses_its_number(sdk: Sdk, what: str) -> None:
    """It says why, at once, and the next call goes on."""
    make, status, words = WRONG[what]
    model_id = sdk.model()
    found, said = sdk.asked(*make(model_id))
    assert (found, words in said["detail"]) == (status, True), said
    if what == "no model of that name" or what == "bytes that are no message":
        return
    step = {"model_id": model_id, "seq_id": 2, "adam_params": {}}
    assert sdk.result(sdk.post("optim_step", step))["metrics"]["step:last"] == 1


def test_what_the_servers_refuse_is_the_result(sdk: Sdk) -> None:
    """A failure of the user's, which the SDK raises and does not send again."""
    model_id = sdk.model()
    short = datum(weights=packed([1.0], "float32"))
    failed = sdk.result(sdk.post("forward_backward", call(model_id, 1, data=[short])))
    assert failed["category"] == "user"
    assert 'data[0].loss_fn_inputs["weights"]' in failed["error"]
    step = {"model_id": model_id, "seq_id": 2, "adam_params": {}}
    assert sdk.result(sdk.post("optim_step", step))["metrics"]["step:last"] == 1


def test_sparse_targets_are_dense_ones(sdk: Sdk) -> None:
    """A matrix whose rows come compressed has the loss of the whole one; empty cells weigh 0."""
    model_id = sdk.model()
    targets = np.array([[6, 3], [7, 0], [8, 4], [9, 0]])
    weights = np.array([[0.5, 0.5], [1, 0], [0.25, 0.75], [1, 0]], np.float32)

    def sparse(array: np.ndarray, kind: Any) -> tinker.Tensor:
        rows, columns = np.nonzero(weights)
        crow = np.searchsorted(rows, np.arange(5)).astype("<i8")
        csr = tinker.SparseCsr(
            values=array[rows, columns].tobytes(),
            crow_indices=crow.tobytes(),
            col_indices=columns.astype("<i8").tobytes(),
        )
        return tinker.Tensor(sparse_csr=csr, dtype=kind, shape=array.shape)

    whole = datum(target_tokens=packed(targets, "int64"), weights=packed(weights, "float32"))
    pieces = datum(
        target_tokens=sparse(targets, tinker.D_TYPE_INT64),
        weights=sparse(weights, tinker.D_TYPE_FLOAT32),
    )
    dense = sdk.passed(sdk.post("forward_backward", call(model_id, 1, data=[whole])))
    found = sdk.passed(sdk.post("forward_backward", call(model_id, 2, data=[pieces])))
    assert found.metrics["loss:sum"] == dense.metrics["loss:sum"]
    assert list(found.loss_fn_outputs[0].fields["logprobs"].trailing_shape) == [2]


def test_matrices_are_bounded_by_what_they_are_once_whole(sdk: Sdk) -> None:
    """All of a call together: an empty one takes some bytes of the body, whatever its size."""

    def empty(columns: int) -> tinker.Tensor:
        csr = tinker.SparseCsr(crow_indices=bytes(16))
        return tinker.Tensor(sparse_csr=csr, dtype=tinker.D_TYPE_FLOAT32, shape=[1, columns])

    model_id = sdk.model()
    half = 9_000_000
    cases = [
        (call(model_id, 1, data=[datum(weights=empty(2 * half))]), "data[0]"),
        (call(model_id, 2, data=[datum(weights=empty(half))] * 2), "data[1]"),
        (call(model_id, 3, data=[datum(a=empty(half), b=empty(half))]), "data[0]"),
    ]
    for body, where in cases:
        status, said = sdk.asked("forward_backward", body)
        assert (status, said["field"].partition(".")[0]) == (400, where)
        assert "more than 67108864 bytes" in said["detail"]
    sdk.passed(sdk.post("forward_backward", call(model_id, 4)))


def test_calls_that_wait_are_bounded_by_their_bytes(
    cluster: RunningCluster, tmp_path: Path
) -> None:
    """Their requests have ended, their data have not."""
    limits = {"received_bytes_max": 500_000, "body_bytes_max": 250_000, "peer_share_max": 1}
    limits["request_s_max"] = 1
    with running_gateway(cluster.address, tmp_path, **limits) as gateway:
        sdk = Sdk(gateway, patient=True)  # a second is little on a busy machine
        model_id = sdk.model()
        large = datum(weights=packed(np.ones(60_000), "float32"))

        def refused(seq_id: int) -> tuple[int, str]:
            more = call(model_id, seq_id, data=[large])
            status, said = ask(gateway, f"{PATH}/forward_backward", more)
            return status, said["reason"]

        sdk.post("forward_backward", call(model_id, 1000))  # waits for those before it
        for seq_id in (2000, 2500):
            assert refused(seq_id) == (503, "QUEUE_FULL")
        assert refused(3000) == (429, "QUEUE_FULL")
        assert refused(2000) == (503, "QUEUE_FULL")  # it has its place


def test_old_sdks_send_and_take_json(sdk: Sdk) -> None:
    """The same call in either form is the same call."""
    model_id = sdk.model()
    tensors = {"target_tokens": {"data": [6, 7, 8, 9], "dtype": "int64", "shape": [4]}}
    chunks = [{"type": "encoded_text", "tokens": [5, 6, 7, 8]}]
    one = {"model_input": {"chunks": chunks}, "loss_fn_inputs": tensors}
    given = {"data": [one], "loss_fn": "cross_entropy"}
    body = {"model_id": model_id, "seq_id": 1, "forward_backward_input": given}
    headers = {"Content-Type": "application/json"}
    path = f"{PATH}/forward_backward"
    status, promise = ask(sdk.gateway, path, body, headers=headers)
    assert status == 200, promise
    assert promise == sdk.post("forward_backward", call(model_id, 1))
    found = sdk.result(promise, "application/json")
    (output,) = found["loss_fn_outputs"]
    packed_form = sdk.passed(promise).loss_fn_outputs[0].fields["logprobs"].data
    assert output["logprobs"]["data"] == np.frombuffer(packed_form, "<f4").tolist()
    forward = {"model_id": model_id, "seq_id": 2, "forward_input": given}
    again = sdk.result(sdk.post("forward", forward), "application/json")
    assert again["metrics"]["loss:sum"] == found["metrics"]["loss:sum"]
    one["loss_fn_inputs"] = {"target_tokens": {"data": [6, "x"], "dtype": "int64"}}
    status, said = ask(sdk.gateway, path, {**body, "seq_id": 3}, headers=headers)
    assert (status, said["field"]) == (400, 'data[0].loss_fn_inputs["target_tokens"]')


def test_all_who_wait_have_the_result(sdk: Sdk) -> None:
    """As soon as it is there."""
    model_id = sdk.model()
    promise = sdk.post("optim_step", {"model_id": model_id, "seq_id": 2, "adam_params": {}})
    found: list[Any] = []
    waiting = [threading.Thread(target=lambda: found.append(sdk.result(promise))) for _ in range(3)]
    for each in waiting:
        each.start()
    sdk.post("optim_step", {"model_id": model_id, "seq_id": 1, "adam_params": {}})
    for each in waiting:
        each.join(30)
    assert [result["metrics"]["step:last"] for result in found] == [2, 2, 2]
