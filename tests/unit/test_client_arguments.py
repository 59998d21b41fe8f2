"""One bad argument is refused in the caller's thread with its field, and costs no number.

And a number that was taken is used or given up, however the work that carries it ends.
"""

import asyncio
import inspect
import threading
import types as python_types
import typing
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import tinsmith
from faults.peer import Peer
from tinsmith import _calls, types

ADAM = tinsmith.AdamParams()
PROMPT = tinsmith.ModelInput.from_ints([1, 2, 3])
TIMEOUT_S = 20


@pytest.fixture
def trainer(peer: Peer) -> tinsmith.TrainingClient:
    return (
        tinsmith.ServiceClient(base_url=peer.address).create_lora_training_client("base").result(10)
    )


def data(targets: Any = (2, 3, 4), weights: Any = (1.0, 1.0, 1.0)) -> list[tinsmith.Datum]:
    inputs = {"target_tokens": list(targets), "weights": list(weights)}
    return [tinsmith.Datum(PROMPT, inputs)]


GOOD: dict[str, Any] = {
    **{"data": data(), "loss_fn": "ppo", "loss_fn_config": {"clip_low_threshold": 0.5}},
    **{"optim_params": ADAM, "name": "name", "path": "tinsmith://m/weights/a", "ttl_seconds": 3600},
    **{"overwrite": True, "user_metadata": {"key": "value"}, "prompt": PROMPT, "num_samples": 2},
    **{"sampling_params": types.SamplingParams(max_tokens=3), "include_prompt_logprobs": True},
    **{"topk_sample_logprobs": 2, "prompt_alt_tokens_k": 2, "prompt_logprobs_last_n": 1},
    **{"target_prompt_logprobs": types.TensorData([[1, -1], [2, 3]])},
    **{"topk_prompt_logprobs": 2, "base_model": "base", "rank": 4, "seed": 1, "train_mlp": True},
    **{"train_attn": True, "train_unembed": True, "model_id": "m", "training_run_id": "m"},
    **{"checkpoint_id": "weights/a", "limit": 1, "offset": 0, "tinker_path": "tinsmith://m/weights/a"},
    **{"destination_path": "tinsmith://m/weights/b", "folder": "folder", "model_path": None},
    **{"expert_rank": 2, "holder": None, "sampling_session_id": "s", "handle": "x"},
    **{"api_key": "tml-x", "session_id": "s", "sampler_id": "s", "event_type": "all", "day": None},
    **{"starting_on": "2026-01-01", "ending_before": "2026-02-01"},
    **{"request": types.SessionSearchRequest(), "age_encryption_recipients": None},
    **{"fn": lambda logprobs: (logprobs.sum(), {}), "input_ranks": {"logprobs": 1}},
}  # fmt: skip
UNSUPPORTED = {
    *("retry_config", "record_stability_info", "kind", "weights_access_token", "adam_params"),
    *("loss_type_input", "optimizer", "destination_project_id", "project_id", "status"),
    *("detail", "access_scope", "args", "kwargs", "keep"),
}
BAD = [
    *(10, 2.5, 3600.0, float("nan"), 2**70, -(2**70), -5, True, None, "\ud800", "", b"bytes"),
    *(object(), {"key": 1}, {1: "value"}, {"key": "\ud800"}, {"\ud800": "value"}, [1, "a"], [[1]]),
    *(
        [None],
        np.float32(1.5),
        np.array([1.5]),
        types.SaveWeightsResponse("tinsmith://m/weights/a"),
    ),
    *({"clip_low_threshold": "x"}, {"clip_low_threshold": None}, {"beta": 1.0}, len, [1.5], 1j),
]
TAKE_NOTHING = (
    *("close", "delete", "get_tokenizer", "get_server_capabilities", "get_info", "get_base_model"),
    *("create_rest_client", "on_queue_state_change", "assign_session_project"),
)
METHODS = [
    (cls, name)
    for cls in (
        tinsmith.TrainingClient,
        tinsmith.SamplingClient,
        tinsmith.ServiceClient,
        tinsmith.RestClient,
    )
    for name, _ in inspect.getmembers(cls, inspect.isfunction)
    if not name.startswith("_") and not name.endswith("_async") and name not in TAKE_NOTHING
]


def parameters(cls: type, name: str) -> dict[str, Any]:
    """The parameters that take a value, with a good one for each."""
    found = {}
    for each in inspect.signature(getattr(cls, name)).parameters:
        if each != "self" and each not in UNSUPPORTED:
            found[each] = GOOD[each]  # a new one has to be named there
    if "tinker_path" in found:
        found.pop("path", None)
    if name == "forward_backward_custom":
        found["loss_fn"] = lambda data, logprobs: (logprobs[0].sum(), {})
    return found


@pytest.mark.parametrize(("cls", "name"), METHODS, ids=lambda part: getattr(part, "__name__", part))
def test_what_can_fail_in_the_client_fails_in_the_callers_thread_with_its_field(
    peer: Peer, cls: type, name: str
) -> None:
    """Every parameter of every method is given every bad value: it is refused at once, or it is
    sent; and the calls after it have the numbers that follow."""
    service = tinsmith.ServiceClient(base_url=peer.address)
    trainer = service.create_lora_training_client("base").result(10)
    client: Any = {
        tinsmith.TrainingClient: trainer,
        tinsmith.SamplingClient: service.create_sampling_client(base_model="base").result(10),
        tinsmith.ServiceClient: service,
        tinsmith.RestClient: service.create_rest_client(),
    }[cls]
    good = parameters(cls, name)
    refused: dict[Any, Any] = {}
    for parameter in good:
        for bad in BAD:
            try:
                result = getattr(client, name)(**{**good, parameter: bad})
                if isinstance(result, Iterator) and not isinstance(result, tinsmith.APIFuture):
                    list(result)
            except tinsmith.UnimplementedError as error:  # the whole method, or this value
                refused[parameter, repr(bad)] = (error.field or name, str(error).encode())
            except tinsmith.InvalidArgumentError as error:
                refused[parameter, repr(bad)] = (error.field, str(error).encode())
            except TypeError:  # as in Tinker
                refused[parameter, repr(bad)] = ((name, bad) == ("optim_step", None), b"text")
    assert all(field and text for field, text in refused.values())
    # A name of ephemeral weights is ignored, as in Tinker; the other two are not supported.
    lenient = ("save_weights_and_get_sampling_client", "publish", "unpublish")
    assert refused or not good or name.startswith(lenient)
    trainer.optim_step(ADAM).result(TIMEOUT_S)
    numbers = set(peer.servicer.arrived)
    assert numbers == set(range(1, len(numbers) + 1))
    service.close().result(10)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda t: t.save_state(10), "name"),
        (lambda t: t.save_state("a", ttl_seconds=1.5), "ttl_seconds"),
        (lambda t: t.save_state("a", ttl_seconds=10**30), "ttl_seconds"),
        (lambda t: t.save_state("a", user_metadata={"k": 1}), "user_metadata['k']"),
        (lambda t: t.save_state("\ud800"), "name"),
        (lambda t: t.load_state(t.save_state("a").result(10)), "path"),
        (lambda t: t.save_weights_for_sampler("a", ttl_seconds="1"), "ttl_seconds"),
        (lambda t: t.save_weights_for_sampler(""), "name"),
        (lambda t: t.forward(data(), "ppo", {"clip_low_threshold": "0.8"}),
         "loss_fn_config['clip_low_threshold']"),
        (lambda t: t.forward_backward_custom(data(), 5), "loss_fn"),
        (lambda t: t.forward_backward(data()[0], "ppo"), "data"),
        (lambda t: t.forward_backward([1], "ppo"), "data[0]"),
    ],
)  # fmt: skip
def test_one_bad_argument_names_its_field_and_hangs_nothing(
    peer: Peer, trainer: tinsmith.TrainingClient, call: Any, field: str
) -> None:
    """What the issue saw: each of these made a model wait for an hour."""
    with pytest.raises(tinsmith.InvalidArgumentError) as refusal:
        call(trainer)
    assert refusal.value.field == field
    trainer.optim_step(ADAM).result(TIMEOUT_S)


# --- numbers that were taken ----------------------------------------------------------------------


EXCEPTIONS = [ValueError, StopIteration, SystemExit, KeyboardInterrupt, GeneratorExit]


@pytest.mark.parametrize("raised", [*EXCEPTIONS, asyncio.CancelledError])
def test_a_custom_loss_that_ends_in_any_way_gives_its_numbers_up(
    peer: Peer, trainer: tinsmith.TrainingClient, raised: type[BaseException]
) -> None:
    """Also with what cannot pass through a future, or would end the client's event loop."""
    pytest.importorskip("torch")

    def loss(data: Any, logprobs: Any) -> Any:
        raise raised

    failed = trainer.forward_backward_custom(data(), loss)
    behind = trainer.optim_step(ADAM)
    with pytest.raises(BaseException):  # noqa: B017, PT011  # which one does not matter here
        failed.result(TIMEOUT_S)
    behind.result(TIMEOUT_S)
    assert peer.servicer.applied == [(1, "forward"), (3, "optim_step")]


@pytest.mark.parametrize("returned", [None, 1, (1, 2), ("a", {}), (None, {}), [], object()])
def test_a_custom_loss_that_returns_anything_else_is_refused(
    peer: Peer, trainer: tinsmith.TrainingClient, returned: Any
) -> None:
    """With the field, and the model goes on."""
    pytest.importorskip("torch")
    failed = trainer.forward_backward_custom(data(), lambda data, logprobs: returned)
    with pytest.raises(tinsmith.InvalidArgumentError) as refusal:
        failed.result(TIMEOUT_S)
    assert refusal.value.field == "loss_fn"
    trainer.optim_step(ADAM).result(TIMEOUT_S)


def test_a_call_whose_answer_cannot_be_read_gives_its_number_up(
    peer: Peer, trainer: tinsmith.TrainingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong between the number and the answer."""

    def unreadable(*_: Any) -> Any:
        raise RuntimeError("mine")

    monkeypatch.setattr(_calls, "output_from_pb", unreadable)
    failed = trainer.forward(data(), "cross_entropy")
    with pytest.raises(RuntimeError, match="mine"):
        failed.result(TIMEOUT_S)
    trainer.optim_step(ADAM).result(TIMEOUT_S)
    assert [number for number, _ in peer.servicer.applied] == [1, 2]


def test_work_that_is_cancelled_before_delivery_gives_its_number_up(
    peer: Peer, trainer: tinsmith.TrainingClient
) -> None:
    """Cancelled from inside while its first message has not left."""
    from tinsmith import _loop

    lane = trainer._lane

    started: list[Any] = []
    until_started = threading.Event()

    async def never(numbers: Any) -> None:
        started.append(asyncio.current_task())
        until_started.set()
        await asyncio.sleep(3600)

    stuck = lane.submit(2, never)
    behind = trainer.optim_step(ADAM)
    until_started.wait(10)
    assert not behind.future().done()
    _loop.loop().call_soon_threadsafe(started[0].cancel)
    with pytest.raises(tinsmith.FailedPreconditionError):
        stuck.result(TIMEOUT_S)
    behind.result(TIMEOUT_S)
    assert peer.servicer.applied == [(3, "optim_step")]


# --- what is converted ----------------------------------------------------------------------------


def same(value: Any) -> list[Any]:
    """One list in every form that numpy, torch and Python have for it."""
    torch = pytest.importorskip("torch")
    forms = [value, tuple(value), np.array(value), torch.tensor(value)]
    forms += [[np.int64(v) for v in value], [torch.tensor(v) for v in value]]
    kinds = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
    forms += [np.array(value, kind) for kind in (*kinds, "float32", "float64")]
    forms += [np.array(value, ">i8"), np.repeat(np.array(value), 2)[::2]]
    forms += [torch.tensor(value, dtype=getattr(torch, kind)) for kind in kinds if kind != "uint64"]
    forms += [torch.tensor(value, dtype=kind) for kind in (torch.float64, torch.bfloat16)]
    forms += [torch.tensor(value, dtype=torch.float32, requires_grad=True)]
    return [*forms, tinsmith.TensorData(value), tinsmith.TensorData(value, "float32")]


@pytest.mark.parametrize(("name", "dtype"), [("target_tokens", "int64"), ("weights", "float32")])
def test_arrays_and_lists_are_read_by_the_inputs_name_alike(name: str, dtype: str) -> None:
    """Every dtype that holds the values gives the same array."""
    for given in same([0, 1, 100]):
        found = tinsmith.Datum(PROMPT, {name: given}).loss_fn_inputs[name]
        assert (found.dtype, found.tolist()) == (dtype, [0, 1, 100]), given


def test_masks_are_weights() -> None:
    """Booleans are 0 and 1, in every form."""
    torch = pytest.importorskip("torch")
    mask = [True, False, True]
    for given in (mask, np.array(mask), torch.tensor(mask), [np.bool_(bit) for bit in mask]):
        found = tinsmith.Datum(PROMPT, {"weights": given}).loss_fn_inputs["weights"]
        assert (found.dtype, found.tolist()) == ("float32", [1.0, 0.0, 1.0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_tokens", [1.5, 2, 3]),
        ("target_tokens", np.array([np.nan, 1, 2])),
        ("target_tokens", np.array([2**63, 1, 2], np.uint64)),
        ("target_tokens", [2**70, 1, 2]),
        ("target_tokens", np.array([1e30, 1, 2])),
        ("weights", np.array([2**24 + 1, 0, 0])),
        ("weights", np.array([1e300, 0, 0])),
        ("weights", "text"),
        ("weights", 1.0),
        ("weights", [1j, 0, 0]),
        ("weights", [[1.0], [2.0, 3.0]]),
        ("weights", np.ma.masked_array([1.0, 2.0, 3.0], [True, False, False])),
        ("advantages", {"a": 1}),
        ("logprobs", None),
        ("weights", [None, 1, 2]),
        ("other", np.array(["a"])),
    ],
)
def test_what_does_not_convert_exactly_is_refused_with_its_name(name: str, value: Any) -> None:
    with pytest.raises(tinsmith.InvalidArgumentError) as refusal:
        tinsmith.Datum(PROMPT, {name: value})
    assert refusal.value.field == f'loss_fn_inputs["{name}"]'


def test_tokens_come_from_whatever_holds_integers() -> None:
    """Lists, arrays, tensors, iterators, and what transformers' tokenizers return."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    ids = [1, 2, 3]
    given = [ids, tuple(ids), iter(ids), np.array(ids), np.array(ids, np.uint16), range(1, 4)]
    given += [torch.tensor(ids), [np.int32(i) for i in ids], [torch.tensor(i) for i in ids]]
    given += [transformers.BatchEncoding({"input_ids": ids, "attention_mask": [1, 1, 1]})]
    given += [transformers.BatchEncoding({"input_ids": torch.tensor([ids])})]
    for tokens in given:
        found = tinsmith.ModelInput.from_ints(tokens).to_ints()
        assert found == ids
        assert {type(token) for token in found} == {int}
    for bad in ([1.0, 2.0], [True], "123", [[1, 2]], [None], {"a": [1]}, 5, [2**63], torch.eye(2)):
        with pytest.raises(tinsmith.InvalidArgumentError) as refusal:
            tinsmith.ModelInput.from_ints(bad)  # type: ignore[arg-type]
        assert refusal.value.field == "tokens"
    two = transformers.BatchEncoding({"input_ids": [ids, ids]})
    with pytest.raises(tinsmith.InvalidArgumentError):
        tinsmith.ModelInput.from_ints(two)


def test_scalars_of_numpy_and_torch_are_numbers() -> None:
    """In stops, seeds, settings and optimizer parameters."""
    torch = pytest.importorskip("torch")
    params = tinsmith.SamplingParams(
        max_tokens=np.int64(5),
        seed=np.uint64(2**64 - 1),  # type: ignore[arg-type]
        stop=np.array([1, 2], np.uint16),  # type: ignore[arg-type]
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        top_p=torch.tensor(0.5),  # type: ignore[arg-type]
        top_k=np.array(3),  # type: ignore[arg-type]
    )
    assert params == tinsmith.SamplingParams(5, 2**64 - 1, [1, 2], 0.5, 3, 0.5)
    assert {type(value) for value in vars(params).values()} == {int, list, float}
    adam = tinsmith.AdamParams(learning_rate=torch.tensor(0.5), beta1=np.float64(0.5))  # type: ignore[arg-type]
    assert adam == tinsmith.AdamParams(0.5, 0.5)


@pytest.mark.parametrize("seed", [0, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)])
def test_seeds_of_64_bits_are_sent(peer: Peer, seed: int) -> None:
    """Signed or not; two of them are never one."""
    service = tinsmith.ServiceClient(base_url=peer.address)
    service.create_lora_training_client("base", seed=seed).result(10)
    sampler = service.create_sampling_client(base_model="base").result(10)
    sampler.sample(PROMPT, 1, tinsmith.SamplingParams(seed=seed)).result(10)
    assert [sent % 2**64 for sent in peer.servicer.sample_seeds] == [seed % 2**64]
    for beyond in (2**64, -(2**63) - 1):
        with pytest.raises(tinsmith.InvalidArgumentError) as refusal:
            service.create_lora_training_client("base", seed=beyond)
        assert refusal.value.field == "seed"


@pytest.mark.parametrize("rank", [0, 9, 2.0, "4"])
def test_a_rank_for_experts_is_at_most_the_rank(peer: Peer, rank: Any) -> None:
    service = tinsmith.ServiceClient(base_url=peer.address)
    service.create_lora_training_client("base", rank=8, expert_rank=8).result(10)
    with pytest.raises(tinsmith.InvalidArgumentError) as refusal:
        service.create_lora_training_client("base", rank=8, expert_rank=rank)
    assert refusal.value.field == "expert_rank"


@pytest.mark.parametrize("count", [0, -1, 2**31, 1.0, None])
def test_a_number_of_samples_that_is_none_is_refused(peer: Peer, count: Any) -> None:
    service = tinsmith.ServiceClient(base_url=peer.address)
    sampler = service.create_sampling_client(base_model="base").result(10)
    for method in (sampler.sample, sampler.sample_stream):
        with pytest.raises(tinsmith.InvalidArgumentError) as refusal:
            method(PROMPT, count)
        assert refusal.value.field == "num_samples"


def test_a_datums_inputs_may_be_changed_until_the_call() -> None:
    """Its mapping is the caller's: what is put into it is read like what it was made with."""
    [datum] = data()
    datum.loss_fn_inputs["weights"] = np.array([True, True, False])  # type: ignore[index]
    [request] = _calls.requests_of(
        _calls.pb.ForwardRequest, [datum], _calls.loss_fn_to_pb("ppo", None)
    )
    from tinsmith import tensors

    sent = tensors.decode(request.data[0].loss_fn_inputs["weights"])
    assert sent.tolist() == [1.0, 1.0, 0.0]


def test_every_annotation_can_be_read() -> None:
    """Tools that read signatures, such as this test, need every name in them."""
    for cls, name in METHODS:
        typing.get_type_hints(getattr(cls, name), None, {"Self": cls})
    assert python_types
