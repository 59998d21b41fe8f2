"""What RestClient and AdminClient tell and change, on a real cluster and its gateway."""

import io
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

import tinsmith
from clusters import RunningCluster
from gateways import RunningGateway
from keyed import Keyed
from tinsmith import Datum, ModelInput, SamplingParams, types

TOKENS = [5, 6, 7, 8, 9]
PROMPT = ModelInput.from_ints(TOKENS)


@pytest.fixture
def trainer(
    service: tinsmith.ServiceClient, cluster: RunningCluster
) -> Iterator[tinsmith.TrainingClient]:
    """A fresh model of its own."""
    made = service.create_lora_training_client(cluster.base_model, rank=4, seed=1).result()
    yield made
    made.close()


@pytest.fixture
def rest(service: tinsmith.ServiceClient) -> tinsmith.RestClient:
    return service.create_rest_client()


@pytest.fixture
def named(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway is where the environment says."""
    monkeypatch.setenv("TINSMITH_HTTP_URL", gateway.url)


def example() -> list[Datum]:
    inputs: dict[str, Any] = {"target_tokens": TOKENS[1:], "weights": [1.0, 0.5, 1.0, 1.0]}
    return [Datum(ModelInput.from_ints(TOKENS[:-1]), inputs)] * 2


def got(url: str) -> bytes:
    """What a URL gives without a key."""
    with urllib.request.urlopen(url, timeout=60) as response:
        data: bytes = response.read()
    return data


@pytest.mark.usefixtures("named")
def test_external_weights_are_a_folder_with_a_url_for_each_file(
    trainer: tinsmith.TrainingClient, rest: tinsmith.RestClient, tmp_path: Path
) -> None:
    """PEFT's; they are listed, sampled, given a life and deleted by the path that was returned."""
    path = trainer.save_weights_external("mine").result().path
    assert path == f"tinsmith://{trainer.model_id}/external_weights/mine"
    listed = rest.list_checkpoints(trainer.model_id).result().checkpoints
    assert [(each.tinker_path, each.checkpoint_type) for each in listed] == [(path, "external")]
    found = rest.get_external_weights_urls(path).result()
    assert set(found.urls) == {"adapter_model.safetensors", "adapter_config.json"}
    data = got(found.urls["adapter_model.safetensors"])
    assert load(data).keys()
    folder = rest.download_checkpoint(path, tmp_path / "folder").result()
    assert (folder / "adapter_model.safetensors").read_bytes() == data
    sampler = trainer.create_sampling_client(path).result()
    made = sampler.sample(PROMPT, 1, SamplingParams(max_tokens=2, seed=1)).result()
    assert len(made.sequences[0].tokens) == 2
    assert rest.get_weights_info_by_tinker_path(path).result().lora_rank == 4
    rest.set_checkpoint_ttl_from_tinker_path(path, 3600).result()
    copy = rest.copy_weights(path).result()
    assert copy == f"{path}-copy"
    for each in (path, copy):
        rest.delete_checkpoint_from_tinker_path(each).result()
    with pytest.raises(tinsmith.NotFoundError):
        rest.get_external_weights_urls(path).result()


def test_external_weights_are_asked_for_by_their_path_alone(
    trainer: tinsmith.TrainingClient, rest: tinsmith.RestClient
) -> None:
    """Refused at once, and named."""
    with pytest.raises(tinsmith.InvalidArgumentError, match="save_weights_external"):
        rest.get_external_weights_urls(f"tinsmith://{trainer.model_id}/weights/w")
    with pytest.raises(tinsmith.InvalidArgumentError, match="save_weights_external"):
        trainer.save_weights_for_sampler("external.x")
    with pytest.raises(tinsmith.UnimplementedError, match="age_encryption_recipients"):
        trainer.save_weights_external("x", age_encryption_recipients=["age1"])


@pytest.mark.usefixtures("named")
def test_an_archive_is_the_folder_as_a_tar(
    trainer: tinsmith.TrainingClient, rest: tinsmith.RestClient
) -> None:
    """By the run and the checkpoint's id, or by its path."""
    path = trainer.save_state("w").result().path
    for found in (
        rest.get_checkpoint_archive_url_from_tinker_path(path).result(),
        rest.get_checkpoint_archive_url(trainer.model_id, "weights/w").result(),
    ):
        with tarfile.open(fileobj=io.BytesIO(got(found.url))) as tar:
            assert "adapter_model.safetensors" in tar.getnames()
    with pytest.raises(tinsmith.NotFoundError):
        rest.get_checkpoint_archive_url(trainer.model_id, "weights/absent").result()


def test_where_nobody_names_a_gateway_there_are_no_urls(
    trainer: tinsmith.TrainingClient, rest: tinsmith.RestClient
) -> None:
    """A sentence says what to set, and what does without."""
    path = trainer.save_state("w").result().path
    with pytest.raises(tinsmith.UnimplementedError, match="TINSMITH_HTTP_URL") as refusal:
        rest.get_checkpoint_archive_url_from_tinker_path(path).result()
    assert "download_checkpoint" in str(refusal.value)


def test_what_is_named_as_a_gateway_must_be_one(
    rest: tinsmith.RestClient, cluster: RunningCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No address without a scheme."""
    monkeypatch.setenv("TINSMITH_HTTP_URL", cluster.address)
    with pytest.raises(tinsmith.InvalidArgumentError, match="TINSMITH_HTTP_URL"):
        rest.export_session_trace("x").result()


@pytest.mark.usefixtures("named")
def test_a_session_has_a_timeline(
    service: tinsmith.ServiceClient, trainer: tinsmith.TrainingClient, rest: tinsmith.RestClient
) -> None:
    trainer.forward_backward(example(), "cross_entropy")
    trainer.optim_step(types.AdamParams()).result()
    session = trainer.model_id.partition(":")[0]
    assert b"to step 1" in got(rest.export_session_trace(session).result())


def test_a_mark_says_that_a_checkpoint_is_published(
    trainer: tinsmith.TrainingClient, rest: tinsmith.RestClient
) -> None:
    """And other metadata stay."""
    path = trainer.save_state("w", user_metadata={"a": "b"}).result().path

    def kept() -> types.Checkpoint:
        return rest.list_checkpoints(trainer.model_id).result().checkpoints[0]

    for publish, public in (
        (rest.publish_checkpoint_from_tinker_path, True),
        (rest.publish_checkpoint_from_tinker_path, True),
        (rest.unpublish_checkpoint_from_tinker_path, False),
    ):
        publish(path).result()
        assert (kept().public, kept().user_metadata) == (public, {"a": "b"})


def test_a_caller_learns_who_it_is(rest: tinsmith.RestClient, keyed: Keyed) -> None:
    """The tenant of its key."""
    assert rest.whoami().result().user_urn == "urn:tinsmith:tenant:default"
    for name, tenant in (("alice", "alice"), ("bob's reader", "bob")):
        mine = tinsmith.RestClient(base_url=keyed.cluster.address, api_key=keyed.key(name))
        assert mine.whoami().result().user_urn == f"urn:tinsmith:tenant:{tenant}"


def test_a_key_goes_to_the_gateway_and_its_urls_need_none(
    keyed: Keyed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And another tenant's key gets no URL."""
    assert keyed.cluster.gateway_url is not None
    monkeypatch.setenv("TINSMITH_HTTP_URL", keyed.cluster.gateway_url)
    owned = keyed.own("alice")
    mine, theirs = (
        tinsmith.RestClient(base_url=keyed.cluster.address, api_key=keyed.key(name))
        for name in ("alice", "bob")
    )
    found = mine.get_checkpoint_archive_url_from_tinker_path(owned.training).result()
    assert got(found.url)
    with pytest.raises(tinsmith.NotFoundError):
        theirs.get_checkpoint_archive_url_from_tinker_path(owned.training).result()


def test_storage_is_counted_by_owner(
    service: tinsmith.ServiceClient, trainer: tinsmith.TrainingClient, rest: tinsmith.RestClient
) -> None:
    """By a RestClient, and by an AdminClient that is made with the holder."""
    trainer.save_state("w").result()
    admin = tinsmith.AdminClient(service.holder)
    for client in (rest, admin):
        [found] = client.get_current_checkpoint_storage_usage().result().data
        assert found.user_name == "default"
        assert found.checkpoint_count >= 1
        assert found.size_bytes > 0
    with pytest.raises(tinsmith.UnimplementedError, match="project_id"):
        admin.get_current_checkpoint_storage_usage("other")


def test_a_sampler_is_found_by_its_handle(
    service: tinsmith.ServiceClient,
    trainer: tinsmith.TrainingClient,
    rest: tinsmith.RestClient,
    cluster: RunningCluster,
) -> None:
    """And one is made with the holder, of a model, a path or a handle."""
    path = trainer.save_weights_for_sampler("s").result().path
    made = tinsmith.SamplingClient.create(service.holder, model_path=path).result()
    found = rest.get_sampler(made.get_sampler_handle()).result()
    assert (found.base_model, found.model_path) == (cluster.base_model, path)
    handle = made.get_sampler_handle()
    params = SamplingParams(max_tokens=3, seed=1)
    again = tinsmith.SamplingClient.create(service.holder, sampling_session_id=handle).result()
    texts = [each.sample(PROMPT, 1, params).result().sequences[0].tokens for each in (made, again)]
    assert texts[0] == texts[1]
    base = tinsmith.SamplingClient.create(service.holder, base_model=cluster.base_model).result()
    assert rest.get_sampler(base.get_sampler_handle()).result().model_path is None
    with pytest.raises(tinsmith.InvalidArgumentError, match="holder"):
        tinsmith.SamplingClient.create(service, base_model=cluster.base_model)
    with pytest.raises(tinsmith.InvalidArgumentError):
        rest.get_sampler("none")


def test_sessions_are_searched_by_what_their_models_have(
    cluster: RunningCluster, rest: tinsmith.RestClient
) -> None:
    """Newest first, a page at a time."""
    ids = []
    for number in range(3):
        service = tinsmith.ServiceClient({"nightly": "yes"}, base_url=cluster.address)
        made = service.create_lora_training_client(cluster.base_model, rank=2 + number).result()
        ids.insert(0, made.model_id.partition(":")[0])
    asked = types.SessionSearchRequest(user_metadata={"nightly": "yes"}, limit=2)
    page = rest.search_sessions(asked).result()
    assert page.next_cursor is not None
    rest_of = asked.model_copy(update={"cursor": page.next_cursor})
    last = rest.search_sessions(rest_of).result()
    assert last.next_cursor is None
    assert [each.session_id for each in (*page.sessions, *last.sessions)] == ids
    one = rest.search_sessions(types.SessionSearchRequest(session_id=ids[1])).result()
    assert [each.session_id for each in one.sessions] == [ids[1]]
    assert one.sessions[0].user_metadata == {"nightly": "yes"}
    with pytest.raises(tinsmith.UnimplementedError, match="display_name"):
        rest.search_sessions(types.SessionSearchRequest(display_name="x"))
    rest.assign_session_project(ids[0], "default").result()
    with pytest.raises(tinsmith.InvalidArgumentError, match="project_id"):
        rest.assign_session_project(ids[0], "other")


def test_a_loss_of_one_datum_is_summed_over_all(
    service: tinsmith.ServiceClient, trainer: tinsmith.TrainingClient
) -> None:
    """What it computes is what the same loss by its name does; its metrics are summed or meant."""

    def loss(logprobs: Any, weights: Any) -> Any:
        total = -(logprobs * weights).sum()
        return total, {"custom/nats:sum": total.detach(), "custom/nats:mean": total.detach()}

    handle = service.create_custom_loss(loss, {"logprobs": 1, "weights": 1}).result()
    assert handle.input_names == ("weights",)
    custom = trainer.forward_backward_custom(example(), handle).result().metrics
    named = trainer.forward(example(), "cross_entropy").result().metrics["loss:sum"]
    assert np.isclose(custom["loss:sum"], named)
    assert np.isclose(custom["custom/nats:sum"], named)
    assert np.isclose(custom["custom/nats:mean"], named / 2)
    without = [Datum(PROMPT, {"target_tokens": TOKENS})]
    with pytest.raises(tinsmith.InvalidArgumentError, match="weights"):
        trainer.forward_backward_custom(without, handle).result()
    for ranks in ({"logprobs": 1}, {"logprobs": 1, "weights": 3}):
        with pytest.raises(tinsmith.InvalidArgumentError, match="input_ranks"):
            service.create_custom_loss(loss, ranks)
    with pytest.raises(tinsmith.InvalidArgumentError, match="logprobs"):
        service.create_custom_loss(lambda weights: weights, {"weights": 1})
