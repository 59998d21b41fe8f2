"""Ids that a caller chooses for its models: taken once, for ever, and good wherever an id goes."""

import contextlib
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

import tinsmith
from clusters import RunningCluster
from tinsmith import v1 as pb
from tinsmith.cluster import Cluster
from training_calls import call, forward_backward, logprobs, step
from wire import reason_and_field

LORA = pb.LoraConfig(rank=2, seed=1)
TRAINING = pb.CheckpointKind.CHECKPOINT_KIND_TRAINING


@pytest.fixture
def create(stubs: Cluster) -> Iterator[Callable[..., pb.Model]]:
    """Creates models, which are deleted afterwards."""
    made: list[str] = []

    def one(model_id: str, **fields: Any) -> pb.Model:
        if "checkpoint_path" not in fields:
            fields.setdefault("lora_config", LORA)
        request = pb.CreateModelRequest(model_id=model_id, **fields)
        model = stubs.training.CreateModel(request).model
        made.append(model.model_id)
        return model

    yield one
    for model_id in made:
        with contextlib.suppress(grpc.RpcError):  # it is gone
            delete(stubs, model_id)


def delete(stubs: Cluster, model_id: str) -> None:
    stubs.training.DeleteModel(pb.DeleteModelRequest(model_id=model_id))


def refused(action: Callable[[], Any]) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as refusal:
        action()
    return reason_and_field(refusal.value)


def new_id() -> str:
    return f"{secrets.token_hex(8)}:train:0"


def test_a_model_has_the_id_that_was_asked_for(
    stubs: Cluster, create: Callable[..., pb.Model], cluster: RunningCluster
) -> None:
    """It trains, is saved and sampled under paths with that id, and another begins there."""
    model_id = new_id()
    assert create(model_id).model_id == model_id
    forward_backward(stubs, call(model_id, 1))
    stubs.training.OptimStep(step(model_id, 2, learning_rate=0.1))
    save = pb.SaveCheckpointRequest(model_id=model_id, seq_id=3, kind=TRAINING, name="a")
    path = stubs.training.SaveCheckpoint(save).checkpoint_path
    assert path == f"tinsmith://{model_id}/weights/a"
    sampler = pb.SaveCheckpointRequest(model_id=model_id, seq_id=4, kind=2, name="a")
    sampler_path = stubs.training.SaveCheckpoint(sampler).checkpoint_path
    listed = stubs.checkpoint.ListCheckpoints(pb.ListCheckpointsRequest(model_id=model_id))
    assert {found.checkpoint_path for found in listed.checkpoints} == {path, sampler_path}
    copy = new_id()
    create(copy, checkpoint_path=path, with_optimizer=True)
    assert (logprobs(stubs, copy) == logprobs(stubs, model_id)).all()
    service = tinsmith.ServiceClient(base_url=cluster.address)
    sampling = service.create_sampling_client(model_path=sampler_path)
    prompt = tinsmith.types.ModelInput.from_ints([1, 2, 3])
    assert len(sampling.compute_logprobs(prompt).result()) == 3
    sampling.close()


@pytest.mark.parametrize(
    "model_id",
    ["a", "A" * 128, "0.9_x-Y:z", "sess-1:train:0", "f" * 31, "f" * 33, "CON", "a.", "a:..:b"],
)
def test_ids_of_the_grammar_are_taken(
    stubs: Cluster, create: Callable[..., pb.Model], model_id: str
) -> None:
    """Whatever an id may hold it can be trained and saved; upper and lower case are two."""
    create(model_id)
    forward_backward(stubs, call(model_id, 1))
    stubs.training.OptimStep(step(model_id, 2))
    other = model_id.swapcase()
    if other != model_id:
        create(other)
        assert stubs.training.GetModel(pb.GetModelRequest(model_id=other)).model.next_seq_id == 1


@pytest.mark.parametrize(
    "model_id",
    [
        *("a/b", "../a", ".a", ":a", "-a", "_a", "a b", "a\n", "a\0", "ä", "a%2f", "a" * 129),
        *("0123456789abcdef" * 2, "0123456789ABCDEF" * 2),
    ],
)
def test_other_ids_are_refused(stubs: Cluster, model_id: str) -> None:
    """By the field, and so is what looks like an id that the server gives."""
    request = pb.CreateModelRequest(model_id=model_id, lora_config=LORA)
    found = refused(lambda: stubs.training.CreateModel(request))
    assert found == ("INVALID_NAME", "model_id")


def test_an_id_is_given_once(stubs: Cluster, create: Callable[..., pb.Model]) -> None:
    """Not to another create, with or without a checkpoint, and not after it was deleted."""
    model_id = new_id()
    create(model_id, request_id=model_id)
    save = pb.SaveCheckpointRequest(model_id=model_id, seq_id=1, kind=TRAINING, name="a")
    path = stubs.training.SaveCheckpoint(save).checkpoint_path
    exists = ("MODEL_EXISTS", "")
    for there in (True, False):
        assert refused(lambda: create(model_id)) == exists
        assert refused(lambda: create(model_id, checkpoint_path=path)) == exists
        assert refused(lambda: create(model_id, request_id=f"{model_id}2")) == exists
        other = refused(lambda: create(f"{model_id}1", request_id=model_id))
        assert other == ("REQUEST_ID_CONFLICT", "")
        # The same create is the same model, there or gone.
        assert create(model_id, request_id=model_id).model_id == model_id
        if there:
            delete(stubs, model_id)
    assert refused(lambda: forward_backward(stubs, call(model_id, 1)))[0] == "MODEL_NOT_FOUND"


def test_of_many_creates_of_one_id_at_once_one_succeeds(
    stubs: Cluster, create: Callable[..., pb.Model]
) -> None:
    """The others are refused; and a create that fails leaves its id to the next one."""
    model_id = new_id()

    def one(_: int) -> str:
        try:
            return create(model_id).model_id
        except grpc.RpcError as error:
            return reason_and_field(error)[0]

    with ThreadPoolExecutor(8) as pool:
        found = sorted(pool.map(one, range(8)))
    assert found == sorted([model_id] + ["MODEL_EXISTS"] * 7)
    failing = new_id()
    absent = "tinsmith://absent/weights/x"
    for _ in range(2):
        wrong = refused(lambda: create(failing, checkpoint_path=absent))
        assert wrong == ("CHECKPOINT_NOT_FOUND", "")
    assert refused(lambda: create(failing, base_model="x"))[0] == "BASE_MODEL_NOT_FOUND"
    assert create(failing).model_id == failing
