"""Tokens of an issuer in a whole cluster: each server and the gateway know whose they are."""

import json
import secrets
import time
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import pytest

import tinsmith
from keyed import SEEN_S, Keyed
from tinsmith import v1 as pb
from tinsmithd.oidc.tokens import tenant_of
from training_calls import tokens_of
from wire import reason_and_field


def token(keyed: Keyed, subject: str, groups: str = "users", **claims: object) -> str:
    """A token of somebody."""
    return keyed.issuer.token(subject, groups=groups, **claims)


@pytest.fixture
def subject() -> str:
    """Somebody who has nothing yet."""
    return f"auth0|{secrets.token_hex(4)}"


def test_what_a_token_makes_is_its_tenants_on_every_server(keyed: Keyed, subject: str) -> None:
    """A later token of it, and a key for that tenant, go on with it; a key of the same name as its
    subject does not see it."""
    first = token(keyed, subject)
    own = keyed.own(first, "mine")
    tenant = tenant_of("oidc-", subject)
    later = keyed.stubs(token(keyed, subject, jti="later"))
    model = later.training.GetModel(pb.GetModelRequest(model_id="mine")).model
    assert model.owner == tenant
    for path in (own.training, own.sampler):
        asked = pb.GetCheckpointRequest(checkpoint_path=path)
        assert later.checkpoint.GetCheckpoint(asked).checkpoint.owner == tenant
    request = pb.SampleRequest(
        prompt=tokens_of([1, 2, 3]),
        sampling_params=pb.SamplingParams(max_tokens=2, seed=1),
        num_samples=1,
        checkpoint_path=own.sampler,
    )
    assert list(later.sampler.Sample(request))
    keyed.add("the same", tenant)
    time.sleep(SEEN_S)
    found = keyed.stubs("the same").training.ListModels(pb.ListModelsRequest())
    assert [each.model_id for each in found.models] == ["mine"]
    for other in ("bob", token(keyed, "auth0"), token(keyed, tenant)):
        with pytest.raises(grpc.RpcError) as refused:
            keyed.stubs(other).training.GetModel(pb.GetModelRequest(model_id="mine"))
        assert reason_and_field(refused.value)[0] == "MODEL_NOT_FOUND"
        with pytest.raises(grpc.RpcError) as refused:
            list(keyed.stubs(other).sampler.Sample(request))
        assert reason_and_field(refused.value)[0] == "CHECKPOINT_NOT_FOUND"


def test_a_subject_is_no_keys_tenant(keyed: Keyed) -> None:
    """Alice of the issuer is another one than Alice of the file."""
    keyed.create("alice", "of-the-file")
    with pytest.raises(grpc.RpcError) as refused:
        keyed.stubs(token(keyed, "alice")).training.GetModel(
            pb.GetModelRequest(model_id="of-the-file")
        )
    assert reason_and_field(refused.value)[0] == "MODEL_NOT_FOUND"
    keyed.stubs("alice").training.DeleteModel(pb.DeleteModelRequest(model_id="of-the-file"))


def test_scopes_of_tokens_are_those_of_keys(keyed: Keyed, subject: str) -> None:
    """A reader reads what its tenant has, an operator what anybody has."""
    keyed.create(token(keyed, subject), "theirs")
    reader = keyed.stubs(token(keyed, subject, "readers"))
    assert reader.training.GetModel(pb.GetModelRequest(model_id="theirs"))
    with pytest.raises(grpc.RpcError) as refused:
        reader.training.DeleteModel(pb.DeleteModelRequest(model_id="theirs"))
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    operator = keyed.stubs(token(keyed, "somebody", "operators"))
    owners = {each.owner for each in operator.training.ListModels(pb.ListModelsRequest()).models}
    assert tenant_of("oidc-", subject) in owners


def test_the_gateway_takes_tokens_as_it_takes_keys(keyed: Keyed, subject: str) -> None:
    """In either header; what is wrong with one is said as the servers say it."""
    keyed.create(token(keyed, subject), "theirs")

    def runs(headers: dict[str, str]) -> tuple[int, str]:
        request = urllib.request.Request(
            f"{keyed.cluster.gateway_url}/api/v1/training_runs?limit=100", headers=headers
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as refused:
            return refused.code, refused.read().decode()

    shown = token(keyed, subject)
    for headers in ({"X-API-Key": shown}, {"Authorization": f"Bearer {shown}"}):
        status, said = runs(headers)
        assert status == 200, said
        found = [run["training_run_id"] for run in json.loads(said)["training_runs"]]
        assert found == ["theirs"]
    old = token(keyed, subject, exp=keyed.issuer.claims()["iat"] - 1)
    assert runs({"X-API-Key": old}) == (401, runs({"X-API-Key": old})[1])
    assert "the token has expired" in runs({"X-API-Key": old})[1]
    assert runs({"X-API-Key": token(keyed, subject, "strangers")})[0] == 403


def test_a_client_goes_on_when_its_token_is_replaced(
    keyed: Keyed, subject: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file has another one before the first ends: calls that begin then show that, and one that
    ends with the first is made again."""
    file = tmp_path / "token"
    now_s = keyed.issuer.claims()["iat"]
    file.write_text(token(keyed, subject, exp=now_s + 8) + "\n")
    monkeypatch.setenv("TINSMITH_API_KEY_FILE", str(file))
    with tinsmith.ServiceClient(base_url=keyed.cluster.address) as client:
        sampler = client.create_sampling_client(base_model=keyed.cluster.base_model)
        prompt = tinsmith.ModelInput.from_ints([1, 2, 3])
        params = tinsmith.SamplingParams(max_tokens=3, seed=1)
        first = sampler.sample(prompt, 1, params).result().sequences[0].tokens
        renewed = token(keyed, subject, jti="renewed")
        file.write_text(renewed)
        while keyed.issuer.claims()["iat"] <= now_s + 8:
            assert sampler.sample(prompt, 1, params).result().sequences[0].tokens == first
        assert sampler.sample(prompt, 1, params).result().sequences[0].tokens == first
        assert renewed not in repr(vars(client))
