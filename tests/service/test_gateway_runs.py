"""Runs, checkpoints, sessions and downloads through the gateway, as HTTP."""

import io
import itertools
import json
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from test_gateway import ask
from transformers import AutoModelForCausalLM

import tinsmith
from clusters import RunningCluster
from gateways import RunningGateway, running_gateway
from tinsmith.cluster import Cluster
from tinsmith.v1 import training_service_pb2, types_pb2

API = "/api/v1"


@pytest.fixture
def run(gateway: RunningGateway, stubs: Cluster, cluster: RunningCluster) -> str:
    """A run of a session, with a checkpoint of each kind."""
    session = ask(gateway, f"{API}/create_session", {})[1]["session_id"]
    run_id = f"{session}:train:0"
    stubs.training.CreateModel(
        training_service_pb2.CreateModelRequest(
            base_model=cluster.base_model,
            model_id=run_id,
            lora_config=types_pb2.LoraConfig(rank=4, train_unembed=False),
            user_metadata={"about": "a test"},
        )
    )
    for kind, name in [
        (types_pb2.CHECKPOINT_KIND_TRAINING, "w"),
        (types_pb2.CHECKPOINT_KIND_SAMPLER, "s"),
        (types_pb2.CHECKPOINT_KIND_SAMPLER, "external.e"),
        (types_pb2.CHECKPOINT_KIND_SAMPLER, ""),
    ]:
        stubs.training.SaveCheckpoint(
            training_service_pb2.SaveCheckpointRequest(model_id=run_id, kind=kind, name=name)
        )
    return run_id


def checkpoints(gateway: RunningGateway, run: str) -> dict[str, Any]:
    """A run's checkpoints by their ids."""
    status, found = ask(gateway, f"{API}/training_runs/{run}/checkpoints")
    assert status == 200
    return {each["checkpoint_id"]: each for each in found["checkpoints"]}


def test_a_run_is_listed_with_its_checkpoints(gateway: RunningGateway, run: str) -> None:
    """By the names that the SDK knows; weights without a name are a sampler's, and not listed."""
    status, found = ask(gateway, f"{API}/training_runs/{run}?access_scope=owned")
    assert status == 200
    expected = {"training_run_id": run, "base_model": "tiny-llama", "is_lora": True}
    expected |= {"lora_rank": 4, "corrupted": False, "user_metadata": {"about": "a test"}}
    assert expected.items() <= found.items()
    assert found["last_checkpoint"]["tinker_path"] == f"tinker://{run}/weights/w"
    assert found["last_sampler_checkpoint"]["checkpoint_id"] == "sampler_weights/s"
    listed = ask(gateway, f"{API}/training_runs?limit=1000&offset=0")[1]
    assert found in listed["training_runs"]
    mine = checkpoints(gateway, run)
    assert {id_: each["checkpoint_type"] for id_, each in mine.items()} == {
        "weights/w": "training",
        "sampler_weights/s": "sampler",
        "external_weights/e": "external",
    }
    everything = ask(gateway, f"{API}/checkpoints?limit=1000&offset=0")[1]
    assert all(each in everything["checkpoints"] for each in mine.values())
    total = everything["cursor"]["total_count"]
    page = ask(gateway, f"{API}/checkpoints?limit=2&offset=1")[1]
    assert page["checkpoints"] == everything["checkpoints"][1:3]
    assert page["cursor"] == {"offset": 1, "limit": 2, "total_count": total}
    for path in ("tinker", "tinsmith"):
        asked = {"tinker_path": f"{path}://{run}/weights/w"}
        status, info = ask(gateway, f"{API}/weights_info", asked)
        assert (status, info["lora_rank"], info["train_unembed"]) == (200, 4, False)


def test_an_sdk_that_knows_no_external_weights_is_told_what_they_are_stored_as(
    gateway: RunningGateway, run: str
) -> None:
    """It takes no third kind, and can delete them by that name."""
    headers = {"x-stainless-package-version": "0.25.0"}
    path = f"{API}/training_runs/{run}/checkpoints"
    found = {c["checkpoint_id"]: c for c in ask(gateway, path, headers=headers)[1]["checkpoints"]}
    old = found["sampler_weights/external.e"]
    assert old["checkpoint_type"] == "sampler"
    assert old["tinker_path"] == f"tinker://{run}/sampler_weights/external.e"
    assert ask(gateway, f"{path}/{old['checkpoint_id']}", method="DELETE")[0] == 204
    assert "external_weights/e" not in checkpoints(gateway, run)


def test_a_checkpoint_is_changed_and_deleted(gateway: RunningGateway, run: str) -> None:
    """Its life, its mark; a second deletion is not found, one that was sent again is done."""
    one = f"{API}/training_runs/{run}/checkpoints/weights/w"
    assert ask(gateway, f"{one}/ttl", {"ttl_seconds": 3600}, method="PUT")[0] == 200
    assert checkpoints(gateway, run)["weights/w"]["expires_at"] is not None
    assert ask(gateway, f"{one}/ttl", {"ttl_seconds": None}, method="PUT")[0] == 200
    assert checkpoints(gateway, run)["weights/w"]["expires_at"] is None
    for method, public in (("POST", True), ("DELETE", False), ("DELETE", False)):
        assert ask(gateway, f"{one}/publish", method=method)[0] == 200
        found = checkpoints(gateway, run)["weights/w"]
        assert (found["public"], found["user_metadata"]) == (public, None)
    assert ask(gateway, one, method="DELETE")[0] == 204
    assert ask(gateway, one, method="DELETE")[0] == 404
    again = {"x-stainless-retry-count": "1"}
    assert ask(gateway, one, method="DELETE", headers=again)[0] == 204
    for body in ({"ttl_seconds": 0}, {"ttl_seconds": "1"}, {"ttl_seconds": 10**12}):
        wrong = one.replace("weights/w", "sampler_weights/s") + "/ttl"
        status, said = ask(gateway, wrong, body, method="PUT")
        assert (status, said["field"]) == (400, "ttl_seconds")


def test_a_copy_is_a_run_of_its_own(gateway: RunningGateway, run: str) -> None:
    """Made once for each idempotency key, however often it is sent; a run without a model."""
    headers = {"x-idempotency-key": str(uuid.uuid4())}
    asked = {"source_path": f"tinker://{run}/weights/w", "destination_project_id": "p"}
    status, made = ask(gateway, f"{API}/copy_weights", asked, headers=headers)
    assert status == 200
    assert ask(gateway, f"{API}/copy_weights", asked, headers=headers) == (200, made)
    assert ask(gateway, f"{API}/copy_weights", asked)[1] != made
    copied = made["tinker_path"].removeprefix("tinker://").partition("/")[0]
    assert copied != run
    status, found = ask(gateway, f"{API}/training_runs/{copied}")
    assert (status, found["lora_rank"], found["user_metadata"]) == (200, 4, None)
    token = {**headers, "X-Tinker-Weights-Access-Token": "t"}
    assert ask(gateway, f"{API}/copy_weights", asked, headers=token)[0] == 400


def test_what_is_not_there_is_said(gateway: RunningGateway, run: str) -> None:
    """With a body; what cannot succeed later has a status that the SDK does not repeat."""
    for path, method, status in [
        ("training_runs/absent", "GET", 404),
        ("training_runs?limit=-1", "GET", 400),
        ("training_runs?offset=99999999999999999999", "GET", 400),
        ("training_runs?project_id=p", "GET", 400),
        (f"training_runs/{run}/checkpoints/weights/absent", "DELETE", 404),
        (f"training_runs/{run}/checkpoints/others/w", "DELETE", 404),
        (f"training_runs/{run}/checkpoints/weights/absent/publish", "POST", 404),
        (f"training_runs/{run}/checkpoints/weights/w/external_weights_urls", "GET", 400),
        (f"training_runs/{run}/checkpoints/weights/absent/archive", "GET", 404),
        ("billing/usage/events", "GET", 404),
        ("audit", "GET", 404),
        ("sessions/x/trace_export", "GET", 404),
    ]:
        found, said = ask(gateway, f"{API}/{path}", method=method)
        assert (found, bool(said["detail"])) == (status, True), path


def test_what_checkpoints_take_is_told_by_their_owners(gateway: RunningGateway, run: str) -> None:
    """Those without a name too; one that is deleted takes nothing."""
    path = f"{API}/billing/usage/checkpoints/current"
    size_bytes = checkpoints(gateway, run)["weights/w"]["size_bytes"]
    (before,) = ask(gateway, path)[1]["data"]
    assert before["checkpoint_count"] >= 4
    assert (
        ask(gateway, f"{API}/training_runs/{run}/checkpoints/weights/w", method="DELETE")[0] == 204
    )
    (after,) = ask(gateway, path)[1]["data"]
    assert before["checkpoint_count"] - after["checkpoint_count"] == 1
    assert before["size_bytes"] - after["size_bytes"] == size_bytes > 0
    assert ask(gateway, f"{path}?project_id=p")[0] == 400


def test_sessions_are_what_their_runs_say(gateway: RunningGateway, run: str) -> None:
    """Listed, found, searched."""
    session = run.partition(":")[0]
    assert session in ask(gateway, f"{API}/sessions?limit=1000&offset=0")[1]["sessions"]
    status, found = ask(gateway, f"{API}/sessions/{session}?access_scope=owned")
    assert (status, found["training_run_ids"]) == (200, [run])
    assert ask(gateway, f"{API}/sessions/s-{'0' * 32}")[0] == 404
    for project, wanted in [("default", 200), ("p", 400)]:
        path = f"{API}/sessions/{session}/project"
        assert ask(gateway, path, {"project_id": project}, method="PUT")[0] == wanted
    asked = {"session_id": session, "user_metadata": {}, "owner": {"type": "own"}, "limit": 50}
    status, said = ask(gateway, f"{API}/sessions/search", asked)
    assert (status, len(said["sessions"])) == (200, 1)
    assert said["sessions"][0]["checkpoints_count"] == 3
    assert said["sessions"][0]["status"] == {"type": "active"}
    seen: list[str] = []
    cursor = None
    while True:
        asked = {"limit": 1, "cursor": cursor}
        page = ask(gateway, f"{API}/sessions/search", asked)[1]
        seen += [each["session_id"] for each in page["sessions"]]
        cursor = page.get("next_cursor")
        if cursor is None:
            break
    assert (
        len(set(seen))
        == len(seen)
        == len(ask(gateway, f"{API}/sessions?limit=1000")[1]["sessions"])
    )
    for wrong in ({"display_name": "x"}, {"limit": 0}, {"cursor": {}}, {"statuses": "x"}):
        assert ask(gateway, f"{API}/sessions/search", wrong)[0] == 400
    assert ask(gateway, f"{API}/sessions/{session}/project", {}, method="PUT")[0] == 400


@pytest.fixture
def external(run: str) -> str:
    """Path of a run's external weights."""
    return f"{API}/training_runs/{run}/checkpoints/external_weights/e"


def fetched(url: str) -> bytes:
    """What is behind a URL, whole."""
    with urllib.request.urlopen(url, timeout=60) as response:
        body: bytes = response.read()
        assert len(body) == int(response.headers["content-length"])
        return body


def status_of(url: str) -> int:
    """The status of a URL."""
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def loads_in_peft(folder: Path, base: Path) -> bool:
    """Whether PEFT reads a folder as an adapter of a base model."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    return model.peft_config["default"].r == 4


def test_external_weights_are_a_folder_for_peft(
    gateway: RunningGateway, external: str, tiny_model: Path, tmp_path: Path
) -> None:
    """One URL a file, without a key."""
    status, said = ask(gateway, f"{external}/external_weights_urls")
    assert status == 200
    assert sorted(said["urls"]) == ["adapter_config.json", "adapter_model.safetensors"]
    for name, url in said["urls"].items():
        (tmp_path / name).write_bytes(fetched(url))
    assert loads_in_peft(tmp_path, tiny_model)


def test_an_archive_is_the_same_folder(
    gateway: RunningGateway, run: str, tiny_model: Path, tmp_path: Path
) -> None:
    """Of any kind; by a redirection, as SDKs up to 0.35 want it."""
    for kind in ("weights/w", "sampler_weights/s", "external_weights/e"):
        body = fetched(f"{gateway.url}{API}/training_runs/{run}/checkpoints/{kind}/archive")
        with tarfile.open(fileobj=io.BytesIO(body), mode="r:") as archive:
            names = sorted(archive.getnames())
            assert names == [
                "adapter_config.json",
                "adapter_model.safetensors",
                "checkpoint_complete",
            ]
            archive.extractall(tmp_path / kind, filter="data")
        assert loads_in_peft(tmp_path / kind, tiny_model)


def test_a_url_is_for_one_file_and_one_content(gateway: RunningGateway, external: str) -> None:
    """Whatever of it is changed, it is none any more."""
    url = ask(gateway, f"{external}/external_weights_urls")[1]["urls"]["adapter_config.json"]
    parts = urllib.parse.urlsplit(url)
    query = dict(urllib.parse.parse_qsl(parts.query))
    for change in ({"expires": str(int(query["expires"]) + 1)}, {"digest": "0" * 64}):
        changed = urllib.parse.urlencode({**query, **change})
        assert status_of(parts._replace(query=changed).geturl()) == 403
    for absent in query:
        left = urllib.parse.urlencode({k: v for k, v in query.items() if k != absent})
        assert status_of(parts._replace(query=left).geturl()) == 403
    for path in ("adapter_model.safetensors", "model_state.json", "..%2Fmodel_state.json", "é"):
        other = parts.path.replace("adapter_config.json", urllib.parse.quote(path, safe="%"))
        assert status_of(parts._replace(path=other).geturl()) in (403, 404)
    assert status_of(url.replace("external_weights/e", "weights/w")) == 403
    assert fetched(url)
    assert ask(gateway, external, method="DELETE")[0] == 204
    assert status_of(url) == 404


@pytest.fixture
def pair(
    cluster: RunningCluster, tmp_path: Path
) -> Iterator[tuple[RunningGateway, RunningGateway]]:
    """Gateways with one key, which is not that of `gateway`; the URLs of the first end soon."""
    settings = {"signing_key": "k" * 32, "public_url": "https://h.example/p/"}
    with (
        running_gateway(cluster.address, tmp_path / "a", **settings, download_url_s=1) as short,
        running_gateway(cluster.address, tmp_path / "b", **settings) as other,
    ):
        yield short, other


def test_urls_begin_with_the_public_url_and_end_when_they_say(
    pair: tuple[RunningGateway, RunningGateway], external: str, gateway: RunningGateway
) -> None:
    """With one key, gateways take each other's; with another, they do not."""
    short, _ = pair
    urls = [
        ask(each, f"{external}/external_weights_urls")[1]["urls"]["adapter_config.json"]
        for each in pair
    ]
    assert all(url.startswith(f"https://h.example/p{API}/files/") for url in urls)
    ends, lasts = [url.replace("https://h.example/p", short.url) for url in urls]
    fetched(lasts)
    assert status_of(lasts.replace(short.url, gateway.url)) == 403
    until = time.monotonic() + 30
    while status_of(ends) == 200 and time.monotonic() < until:
        time.sleep(0.1)
    for each in pair:
        status, said = ask(each, ends.removeprefix(short.url))
        assert (status, "has expired" in said["detail"]) == (403, True)
    fetched(lasts)


def test_a_session_has_a_timeline(
    gateway: RunningGateway, run: str, service: tinsmith.ServiceClient
) -> None:
    """Steps and checkpoints of its runs, as ui.perfetto.dev reads them; the URL needs no key."""
    training = service.get_training_client(run).result()
    datum = tinsmith.Datum(
        tinsmith.ModelInput.from_ints([5, 6, 7]), {"target_tokens": [6, 7, 8], "weights": [1.0] * 3}
    )
    for _ in range(3):
        training.forward_backward([datum], "cross_entropy")
        training.optim_step(tinsmith.AdamParams(learning_rate=1e-3)).result()
    session = run.partition(":")[0]
    status, said = ask(gateway, f"{API}/sessions/{session}/trace_export")
    assert (status, said["status"]) == (200, "ready")
    with urllib.request.urlopen(said["url"], timeout=60) as response:
        events = json.loads(response.read())["traceEvents"]
    steps = [each for each in events if each["ph"] == "X"]
    assert [each["name"] for each in steps] == ["to step 1", "to step 2", "to step 3"]
    assert all(one["ts"] + one["dur"] == two["ts"] for one, two in itertools.pairwise(steps))
    assert all(each["args"]["loss:sum"] > 0 for each in steps)
    assert {"weights/w", "sampler_weights/s"} <= {each["name"] for each in events}
    broken = said["url"].replace("signature=", "signature=0")
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(broken, timeout=60)
    assert refusal.value.code == 403
    assert ask(gateway, f"{API}/sessions/s-{'0' * 32}/trace_export")[0] == 404
