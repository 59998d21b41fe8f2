"""What a newer client says and this server does not know: refused with the field, on every RPC."""

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from attack.requests import Caller, FieldPath, Method, every_method, paths, valid_requests, wrapped
from clusters import RunningCluster
from tinsmith import v1 as pb
from tinsmith.cluster import Cluster
from wire import reason_and_field

UNKNOWN_CASE = b"\xa2\x1f\x00"  # field 500, an empty message
UNKNOWN_NUMBER = 99
METHODS = every_method()


@pytest.fixture(scope="module")
def valid(stubs: Cluster) -> Iterator[dict[str, Message]]:
    """Valid requests by method; numbered ones ask for "now"."""
    lora = pb.CreateModelRequest(lora_config=pb.LoraConfig(rank=2, seed=1))
    model_id = stubs.training.CreateModel(lora).model.model_id
    save = pb.SaveCheckpointRequest(model_id=model_id, name="s", kind=1)
    found = valid_requests(model_id, stubs.training.SaveCheckpoint(save).checkpoint_path)
    for request in found.values():
        if "seq_id" in request.DESCRIPTOR.fields_by_name:
            request.seq_id = 0  # type: ignore[attr-defined]
    yield found
    stubs.training.DeleteModel(pb.DeleteModelRequest(model_id=model_id))


@pytest.fixture(scope="module")
def caller(cluster: RunningCluster) -> Iterator[Caller]:
    """Sends bytes to the cluster."""
    with Caller(cluster) as found:
        yield found


def refusal_of(caller: Caller, method: Method, content: bytes) -> tuple[str, str]:
    """Reason and field."""
    error = caller.call(method, content)
    assert isinstance(error, grpc.RpcError), f"{method.name} took {content!r}"
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error
    return reason_and_field(error)


def oneofs(method: Method) -> Iterator[FieldPath]:
    """A path through each oneof of a request: the last field is one of its cases."""
    seen = set()
    for path in paths(method.request):
        oneof = path[-1].containing_oneof
        where = tuple(field.full_name for field in path[:-1])
        if oneof is not None and (where, oneof.full_name) not in seen:
            seen.add((where, oneof.full_name))
            yield path


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_an_unknown_case_of_a_oneof_is_refused_never_a_default(
    caller: Caller, valid: dict[str, Message], method: Method
) -> None:
    """Every oneof of every request, and every message: the path ends with the unknown number."""
    content = valid[method.name].SerializeToString()
    places = {path[:-1] for path in paths(method.request)} | {()}
    wanted = {path[:-1] for path in oneofs(method)}
    assert wanted <= places
    for place in places:
        if any(field.message_type.GetOptions().map_entry for field in place[-1:]):
            continue  # a map's entry has a key and a value, and can have nothing else
        unknown = wrapped((*place, None), UNKNOWN_CASE)  # type: ignore[arg-type]
        reason, field = refusal_of(caller, method, content + unknown)
        assert reason == "INVALID_FIELD"
        assert field.endswith("500")
        for named in place[:1]:
            assert field.startswith(named.name)


def set_enum(message: Any, path: FieldPath) -> str:
    """Set the enum at the end of a path to a number that it does not have; returns the path."""
    where = ""
    for field in path[:-1]:
        if field.name in ("key", "value") and field.containing_type.GetOptions().map_entry:
            continue
        inner = getattr(message, field.name)
        where += f".{field.name}"
        if field.message_type.GetOptions().map_entry:
            key = min(inner)
            message, where = inner[key], f'{where}["{key}"]'
        elif field.is_repeated:
            message, where = (inner[0] if len(inner) else inner.add()), f"{where}[0]"
        else:
            message = inner
    setattr(message, path[-1].name, UNKNOWN_NUMBER)
    return f"{where}.{path[-1].name}".removeprefix(".")


def test_an_unknown_number_of_an_enum_is_refused_with_the_field(
    caller: Caller, valid: dict[str, Message]
) -> None:
    """Every enum of every request."""
    found = set()
    for method in METHODS:
        for path in paths(method.request):
            if path[-1].enum_type is None:
                continue
            request = type(valid[method.name])()
            request.CopyFrom(valid[method.name])
            where = set_enum(request, path)
            reason, field = refusal_of(caller, method, request.SerializeToString())
            assert reason in ("INVALID_FIELD", "INVALID_DTYPE"), (method.name, where)
            assert field, (method.name, where)
            assert where.startswith(field), (method.name, where)
            found.add((method.name, where))
    assert len(found) >= 12, found


def test_a_newer_optimizer_or_tuning_uses_the_number_and_changes_nothing(stubs: Cluster) -> None:
    """`optim_params { muon }` is no AdamW step; an unknown tuning makes no adapter."""
    count = stubs.training.ListModels(pb.ListModelsRequest()).total_size
    with pytest.raises(grpc.RpcError) as refusal:
        stubs.training.CreateModel(pb.CreateModelRequest.FromString(UNKNOWN_CASE))
    assert reason_and_field(refusal.value) == ("INVALID_FIELD", "500")
    assert stubs.training.ListModels(pb.ListModelsRequest()).total_size == count
    lora = pb.CreateModelRequest(lora_config=pb.LoraConfig(rank=2, seed=1))
    model_id = stubs.training.CreateModel(lora).model.model_id
    header = pb.OptimStepRequest(model_id=model_id, seq_id=1).SerializeToString()
    with pytest.raises(grpc.RpcError) as refusal:
        stubs.training.OptimStep(pb.OptimStepRequest.FromString(header + UNKNOWN_CASE))
    assert reason_and_field(refusal.value) == ("INVALID_FIELD", "500")
    step = pb.OptimStepRequest(model_id=model_id, seq_id=2)
    assert stubs.training.OptimStep(step).metrics["step:last"] == 1
    stubs.training.DeleteModel(pb.DeleteModelRequest(model_id=model_id))
