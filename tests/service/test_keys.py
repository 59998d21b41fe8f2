"""A cluster with keys: who may call what, and that nobody sees anything of another tenant.

The grid is made from the descriptors: every RPC, and every field of it that has an id.
"""

import contextlib
import pickle
import re
import secrets
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.rpc import error_details_pb2

import tinsmith
from attack.requests import FieldPath, Method, every_method, paths, valid_requests
from keyed import LORA, SAMPLER, TRAINING, Keyed, Owned, shown
from tinsmith import v1 as pb
from tinsmith.errors import AuthenticationError
from tinsmith.status import status_of
from tinsmithd.keys import Scope
from tinsmithd.rpc.auth import FOR_SERVERS, READS
from training_calls import tokens_of
from wire import reason_and_field

METHODS = every_method()
IDS = {
    *("model_id", "model_ids"),
    *("checkpoint_path", "source_checkpoint_path", "destination_checkpoint_path"),
}
"""Fields of requests that name something of somebody."""
TAKEN_AS_OWN = {
    ("CreateModel", "model_id"),
    ("ListCheckpoints", "model_id"),
    ("CopyCheckpoint", "destination_checkpoint_path"),
    ("WriteCheckpoint", "checkpoint_path"),
    ("RenewLeases", "checkpoint_path"),
}
"""Where an id of somebody else's is as good as any other: names are each tenant's own."""
ABSENT = "absent-model"
"""An id of no model."""
WRONG_KEYS = ("no key", "wrong", "revoked", "another scheme", "two keys")


@pytest.fixture(scope="module")
def alices(keyed: Keyed) -> Owned:
    """What Alice has; the model's id is one that she chose."""
    return keyed.own("alice", "alices-model")


@pytest.fixture(scope="module")
def bobs(keyed: Keyed) -> Owned:
    """What Bob has."""
    return keyed.own("bob", "bobs-model")


def id_fields(method: Method) -> list[FieldPath]:
    """Fields of a method's request that have an id."""
    return [
        path
        for path in paths(method.request)
        if path[-1].name in IDS and path[-1].type == FieldDescriptor.TYPE_STRING
    ]


GRID = [(method, path) for method in METHODS for path in id_fields(method)]
NAMES = [f"{method.name}.{'.'.join(field.name for field in path)}" for method, path in GRID]


def test_the_grid_has_every_method_that_names_something() -> None:
    """And the table of who may call what has every method of every service."""
    without = {method.name for method in METHODS} - {method.name for method, _ in GRID}
    assert without == {"GetCapabilities", "ListModels", "GetTokenizer", "WatchCheckpoints"}
    for service, names in {**READS, **FOR_SERVERS}.items():
        if service.startswith("tinsmith."):
            found = {m.name for m in METHODS if m.path.startswith(f"/{service}/")}
            assert set(names) <= found


def request_of(method: Method, path: FieldPath, value: str, own: Owned) -> bytes:
    """A request of somebody who has `own`, in which one field has another id."""
    request = valid_requests(own.model_id, own.training)[method.name]
    if "seq_id" in request.DESCRIPTOR.fields_by_name:
        request.seq_id = 1 if method.name == "GetAnswer" else 0  # type: ignore[attr-defined]
    if method.name == "CreateModel":
        request.ClearField("request_id")
        request.ClearField("model_id")
        if path[-1].name == "checkpoint_path":
            request.ClearField("lora_config")
    if method.name == "CopyCheckpoint":
        request.destination_checkpoint_path = (  # type: ignore[attr-defined]
            f"tinsmith://copies/weights/{secrets.token_hex(4)}"
        )
    message: Any = request
    for field in path[:-1]:
        inner = getattr(message, field.name)
        message = inner.add() if field.is_repeated else inner
    if path[-1].is_repeated:
        getattr(message, path[-1].name).append(value)
    else:
        setattr(message, path[-1].name, value)
    return request.SerializeToString()


def value_of(method: Method, path: FieldPath, model_id: str) -> str:
    """An id or a path of a model, as a field has it."""
    if path[-1].name.startswith("model_id"):
        return model_id
    kind = "sampler_weights" if method.server == "sampler" else "weights"
    return f"tinsmith://{model_id}/{kind}/one"


def outcome(found: grpc.RpcError | list[bytes], said: str) -> tuple[Any, ...]:
    """All that a caller can learn of a call, but for its random id, and for what it said itself."""
    if not isinstance(found, grpc.RpcError):
        return ("OK", len(found))
    status = status_of(found)
    assert status is not None, found
    info = error_details_pb2.ErrorInfo()
    status.details[0].Unpack(info)
    del info.metadata["request_id"]
    rest = [detail.SerializeToString() for detail in status.details[1:]]
    parts = [status.message.encode(), info.SerializeToString(deterministic=True), *rest]
    hidden = [part.replace(said.encode(), b"ID") for part in parts]
    return (found.code().name, *(re.sub(rb"\d+ +bytes", b"", part) for part in hidden))


@pytest.fixture
def tidied(keyed: Keyed) -> Iterator[None]:
    """What Bob took for his own under Alice's names is gone afterwards."""
    yield
    stubs = keyed.stubs("bob")
    for model_id in ("alices-model", ABSENT):
        with contextlib.suppress(grpc.RpcError):
            stubs.training.DeleteModel(pb.DeleteModelRequest(model_id=model_id))
        path = f"tinsmith://{model_id}/weights/one"
        with contextlib.suppress(grpc.RpcError):
            stubs.checkpoint.DeleteCheckpoint(pb.DeleteCheckpointRequest(checkpoint_path=path))


@pytest.mark.usefixtures("tidied")
@pytest.mark.parametrize(("method", "path"), GRID, ids=NAMES)
def test_what_is_foreign_and_what_is_absent_look_the_same(
    keyed: Keyed, alices: Owned, bobs: Owned, method: Method, path: FieldPath
) -> None:
    """To a tenant and to a read-only key; to an administrator they do not."""
    assert len(ABSENT) == len(alices.model_id)  # so that texts that are cut are cut alike
    foreign, absent = (value_of(method, path, id_) for id_ in (alices.model_id, ABSENT))
    for name in ("bob", "bob's reader"):
        metadata = shown(keyed.key(name))
        seen = [
            outcome(
                keyed.caller.call(method, request_of(method, path, said, bobs), metadata=metadata),
                said,
            )
            for said in (foreign, absent)
        ]
        assert seen[0] == seen[1], name
        service = method.path.split("/")[1]
        if (name != "bob" and method.name not in READS[service]) or method.name in FOR_SERVERS.get(
            service, ()
        ):
            assert seen[0][0] == "PERMISSION_DENIED"
        elif (method.name, path[-1].name) not in TAKEN_AS_OWN:
            assert seen[0][0] == "NOT_FOUND"
        malformed = request_of(method, path, "a/../b", bobs)
        wrong = keyed.caller.call(method, malformed, metadata=metadata)
        if isinstance(wrong, grpc.RpcError):
            codes = {"NOT_FOUND", "INVALID_ARGUMENT", "PERMISSION_DENIED"}
            assert wrong.code().name in codes
    if method.name in READS[service]:  # it is there, and only they do not see it
        for name in ("admin", "alice", "alice's reader"):
            request = request_of(method, path, foreign, bobs)
            found = keyed.caller.call(method, request, metadata=shown(keyed.key(name)))
            assert outcome(found, foreign)[0] != "NOT_FOUND", name


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.path)
def test_without_a_good_key_nothing_is_answered(
    keyed: Keyed, alices: Owned, method: Method
) -> None:
    """Whatever the call is about."""
    good = keyed.key("alice")
    keys: dict[str, Any] = {
        "no key": (),
        "wrong": shown("tml-" + secrets.token_urlsafe(32)),
        "revoked": shown(keyed.key("revoked")),
        "another scheme": (("authorization", f"Basic {good}"),),
        "two keys": (*shown(good), *shown(good)),
    }
    assert tuple(keys) == WRONG_KEYS
    request = valid_requests(alices.model_id, alices.training)[method.name].SerializeToString()
    for name, metadata in keys.items():
        found = keyed.caller.call(method, request, metadata=metadata)
        assert outcome(found, "-")[0] == "UNAUTHENTICATED", name
        assert good not in str(found)


def test_reflection_wants_a_key_channelz_an_administrator_and_health_nobody(keyed: Keyed) -> None:
    """Probes have no keys."""
    health = Method("training", "/grpc.health.v1.Health/Check", pb.Tensor.DESCRIPTOR)
    assert keyed.caller.call(health, b"") == [b"\x08\x01"]
    service = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    reflection = Method("sampler", service, pb.Tensor.DESCRIPTOR)
    channelz = Method("checkpoint", "/grpc.channelz.v1.Channelz/GetServers", pb.Tensor.DESCRIPTOR)
    for method, name, code in (
        (reflection, None, "UNAUTHENTICATED"),
        (reflection, "bob's reader", "OK"),
        (channelz, None, "UNAUTHENTICATED"),
        (channelz, "bob", "PERMISSION_DENIED"),
        (channelz, "admin", "OK"),
    ):
        metadata = () if name is None else shown(keyed.key(name))
        assert outcome(keyed.caller.call(method, b"", metadata=metadata), "-")[0] == code


def test_lists_have_what_is_ones_own(keyed: Keyed, alices: Owned, bobs: Owned) -> None:
    """Totals too; an administrator's have all."""
    for name, own in (("alice", alices), ("alice's reader", alices), ("bob", bobs)):
        stubs = keyed.stubs(name)
        models = stubs.training.ListModels(pb.ListModelsRequest(page_size=1000))
        assert own.model_id in {each.model_id for each in models.models}
        assert {each.owner for each in models.models} == {name.partition("'")[0]}
        assert models.total_size == len(models.models)
        found = stubs.checkpoint.ListCheckpoints(pb.ListCheckpointsRequest(page_size=1000))
        assert own.training in {each.checkpoint_path for each in found.checkpoints}
        assert {each.owner for each in found.checkpoints} == {name.partition("'")[0]}
        assert found.total_size == len(found.checkpoints)
    everything = keyed.stubs("admin").training.ListModels(pb.ListModelsRequest(page_size=1000))
    assert {"alice", "bob"} <= {each.owner for each in everything.models}
    stored = keyed.stubs("admin").checkpoint.ListCheckpoints(pb.ListCheckpointsRequest())
    assert {"alice", "bob"} <= {each.owner for each in stored.checkpoints}


def test_tenants_choose_the_same_names(keyed: Keyed) -> None:
    """A model's id, a checkpoint's path, a request's id: each has its own behind them."""
    name = f"same-{secrets.token_hex(4)}"
    mine, theirs = keyed.own("alice", name), keyed.own("bob", name)
    assert mine == theirs
    request = pb.UpdateCheckpointRequest(checkpoint_path=mine.training, user_metadata={"a": "1"})
    request.update_mask.paths.append("user_metadata")
    keyed.stubs("alice").checkpoint.UpdateCheckpoint(request)
    asked = pb.GetCheckpointRequest(checkpoint_path=mine.training)
    assert not keyed.stubs("bob").checkpoint.GetCheckpoint(asked).checkpoint.user_metadata
    keyed.stubs("bob").training.DeleteModel(pb.DeleteModelRequest(model_id=name))
    keyed.stubs("bob").checkpoint.DeleteCheckpoint(
        pb.DeleteCheckpointRequest(checkpoint_path=mine.training)
    )
    keyed.stubs("alice").training.GetModel(pb.GetModelRequest(model_id=name))
    keyed.stubs("alice").checkpoint.GetCheckpoint(asked)
    request_id = secrets.token_hex(8)
    made = {
        keyed.stubs(tenant)
        .training.CreateModel(pb.CreateModelRequest(lora_config=LORA, request_id=request_id))
        .model.model_id
        for tenant in ("alice", "bob")
    }
    assert len(made) == 2


def test_weights_of_one_tenant_are_sampled_by_that_one_alone(keyed: Keyed, alices: Owned) -> None:
    """Also once they are in the Sampler's memory, under their digest."""
    params = pb.SamplingParams(max_tokens=2, seed=1)
    asked = pb.GetCheckpointRequest(checkpoint_path=alices.sampler)
    digest = keyed.stubs("alice").checkpoint.GetCheckpoint(asked).checkpoint.digest
    request = pb.SampleRequest(
        prompt=tokens_of([1, 2, 3]),
        sampling_params=params,
        num_samples=1,
        checkpoint_path=alices.sampler,
        checkpoint_digest=digest,
    )
    for _ in range(2):
        assert list(keyed.stubs("alice").sampler.Sample(request))
        with pytest.raises(grpc.RpcError) as refused:
            list(keyed.stubs("bob").sampler.Sample(request))
        assert reason_and_field(refused.value)[0] == "CHECKPOINT_NOT_FOUND"
    assert list(keyed.stubs("admin").sampler.Sample(request))
    with pytest.raises(grpc.RpcError) as refused:  # it computes, and does not only read
        list(keyed.stubs("alice's reader").sampler.Sample(request))
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_nobody_sees_what_prompts_another_tenant_sampled(keyed: Keyed) -> None:
    """What the Sampler keeps of prompts is told to their tenant alone."""
    prompt = tokens_of(secrets.randbelow(200) for _ in range(200))
    params = pb.SamplingParams(max_tokens=1, seed=1)
    request = pb.SampleRequest(prompt=prompt, sampling_params=params, num_samples=1)

    def cached(name: str) -> int:
        found = list(keyed.stubs(name).sampler.Sample(request))
        return sum(each.prompt_cache_hit_tokens for each in found)

    assert [cached("alice"), cached("bob")] == [0, 0]
    assert cached("alice") > 0
    assert cached("bob") > 0


def test_a_tenant_can_neither_fence_the_servers_off_nor_speak_for_others(
    keyed: Keyed, bobs: Owned
) -> None:
    """A writer's name and epoch, a deposit, `tinsmith-owner` are for servers."""
    write = next(method for method in METHODS if method.name == "WriteCheckpoint")
    header: dict[str, Any] = {
        "checkpoint_path": "tinsmith://m/weights/x",
        "base_model": "tiny-llama",
        "lora_config": LORA,
    }
    for field, value in (("writer", "cluster"), ("deposit", "0" * 32)):
        said = pb.WriteCheckpointHeader(**{**header, field: value})
        request = pb.WriteCheckpointRequest(header=said).SerializeToString()
        found = keyed.caller.call(write, request, metadata=shown(keyed.key("bob")))
        assert outcome(found, "-")[0] == "PERMISSION_DENIED"
        assert isinstance(found, grpc.RpcError)
        assert f"header.{field}" in (found.details() or "")  # type: ignore[attr-defined]
    listing = next(method for method in METHODS if method.name == "ListModels")
    for name in ("bob", "bob's reader", "admin"):
        metadata = (*shown(keyed.key(name)), ("tinsmith-owner", "alice"))
        found = keyed.caller.call(listing, b"", metadata=metadata)
        assert outcome(found, "-")[0] == "PERMISSION_DENIED"


# --- keys come and go -----------------------------------------------------------------------------


def test_a_revoked_key_is_refused_everywhere_and_its_streams_end(keyed: Keyed) -> None:
    """Without a restart, on all servers and at the gateway."""
    key = keyed.add("short-lived", "bob")
    metadata = shown(key)
    asked = {m.server: m for m in METHODS if m.name == "GetCapabilities"}
    assert set(asked) == {"training", "sampler", "checkpoint"}
    time.sleep(0.6)
    with grpc.insecure_channel(keyed.cluster.addresses["checkpoint"]) as channel:
        stub = pb.CheckpointServiceStub(channel)
        watching = stub.WatchCheckpoints(pb.WatchCheckpointsRequest(), metadata=metadata)
        next(watching)
        for method in asked.values():
            assert outcome(keyed.caller.call(method, b"", metadata=metadata), "-")[0] == "OK"
        assert keyed.gateway_status(key) == 200
        keyed.keys.revoke(keyed.made["short-lived"].record.key_id)
        revoked_s = time.monotonic()
        for method in asked.values():
            while outcome(keyed.caller.call(method, b"", metadata=metadata), "-")[0] == "OK":
                assert time.monotonic() - revoked_s < 20
                time.sleep(0.02)
        while keyed.gateway_status(key) == 200:
            assert time.monotonic() - revoked_s < 20
            time.sleep(0.02)
        assert keyed.gateway_status(key) == 401
        print(f"refused by all {time.monotonic() - revoked_s:.2f} s after it was revoked")
        with pytest.raises(grpc.RpcError) as ended:
            next(watching)
        assert ended.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_client_shows_its_key_and_nothing_else_has_it(
    keyed: Keyed, alices: Owned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the argument, or from either variable; a pickled client takes it from there."""
    key = keyed.key("alice")
    address = keyed.cluster.address
    with (
        tinsmith.ServiceClient(base_url=address, give_up_after_s=60) as nobody,
        pytest.raises(AuthenticationError),
    ):
        nobody.get_server_capabilities()
    with tinsmith.ServiceClient(base_url=address, api_key=key) as client:
        sampler = client.create_sampling_client(model_path=alices.sampler)
        pickled, handle = pickle.dumps(sampler), sampler.get_sampler_handle()
        for text in (repr(client), repr(vars(client)), repr(pickled), handle):
            assert key not in text
    for variable in ("TINSMITH_API_KEY", "TINKER_API_KEY"):
        monkeypatch.setenv(variable, key)
        again = pickle.loads(pickled)
        assert len(again.compute_logprobs(tinsmith.types.ModelInput.from_ints([1, 2, 3])).result())
        again.close()
        monkeypatch.delenv(variable)


def test_keys_are_in_no_log_and_no_error(keyed: Keyed) -> None:
    """Runs last: all that was said above is looked through for every key that was shown."""
    said = b"".join(log.read_bytes() for log in keyed.cluster.logs.iterdir())
    assert b"refused" in said
    secret = keyed.keys.read().secret.hex()
    for text in [*(made.text for made in keyed.made.values()), secret]:
        assert text.removeprefix("tml-").encode() not in said
    assert SAMPLER != TRAINING
    assert Scope.SERVER in {record.scope for record in keyed.keys.list()}
