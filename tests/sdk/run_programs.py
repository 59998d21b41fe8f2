"""What a stock Tinker SDK is asked to list, to change, to export and to find; as `programs.py`.

python run_programs.py NAME
"""

import pickle
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tinker
from sampling_programs import BASE_MODEL, drawn, now, refused, run, small_model
from tinker import types


def rest(service: Any) -> Any:
    """Runs and checkpoints: listed, given a life, marked, copied, deleted."""
    training = small_model(service)
    model_id = training.model_id
    state = training.save_state("t1").result().path
    sampler = training.save_weights_for_sampler("s1").result().path
    client = service.create_rest_client()
    found = client.get_training_run(model_id).result()
    assert (found.training_run_id, found.base_model) == (model_id, BASE_MODEL)
    assert found.is_lora
    assert found.lora_rank == 4
    assert client.get_training_run_by_tinker_path(state).result() == found
    runs = client.list_training_runs(limit=100).result()
    assert model_id in [each.training_run_id for each in runs.training_runs]
    names = {each.checkpoint_id for each in client.list_checkpoints(model_id).result().checkpoints}
    assert names == {"weights/t1", "sampler_weights/s1"}
    mine = client.list_user_checkpoints(limit=1000).result()
    assert {state, sampler} <= {each.tinker_path for each in mine.checkpoints}
    info = client.get_weights_info_by_tinker_path(state)
    info = info.result() if hasattr(info, "result") else info
    assert (info.base_model, info.lora_rank) == (BASE_MODEL, 4)
    one = lambda: next(  # noqa: E731
        each
        for each in client.list_checkpoints(model_id).result().checkpoints
        if each.tinker_path == state
    )
    client.publish_checkpoint_from_tinker_path(state).result()
    assert one().public
    client.unpublish_checkpoint_from_tinker_path(state).result()
    assert not one().public
    client.set_checkpoint_ttl_from_tinker_path(state, 7200).result()
    assert one().expires_at is not None
    client.set_checkpoint_ttl_from_tinker_path(state, None).result()
    assert one().expires_at is None
    models = service.get_server_capabilities().supported_models
    assert BASE_MODEL in [each.model_name for each in models]
    sessions = client.list_sessions(limit=100).result().sessions
    session = model_id.partition(":")[0]
    assert session in sessions
    assert client.get_session(session).result().training_run_ids == [model_id]
    if hasattr(client, "get_checkpoint_archive_url_from_tinker_path"):
        url = client.get_checkpoint_archive_url_from_tinker_path(state).result().url
        with (
            urllib.request.urlopen(url) as response,
            tarfile.open(fileobj=response, mode="r|") as archive,
        ):
            files = {member.name for member in archive}
        assert "adapter_model.safetensors" in files
        assert "checkpoint_complete" in files
    client.delete_checkpoint_from_tinker_path(state).result()
    client.delete_checkpoint(model_id, "sampler_weights/s1").result()
    assert client.list_checkpoints(model_id).result().checkpoints == []
    said = refused(lambda: client.delete_checkpoint_from_tinker_path(state).result(), "404")
    return {"said": [said]}


def newer(service: Any) -> Any:
    """What came later: external weights, copies, searches, handles, pickled samplers."""
    training = small_model(service)
    client = tinker.RestClient()
    path = training.save_weights_external("e1", ttl_seconds=3600).result().path
    assert path == f"tinker://{training.model_id}/external_weights/e1"
    found = client.get_external_weights_urls(path).result()
    files = {name: len(urllib.request.urlopen(url).read()) for name, url in found.urls.items()}
    assert sorted(files) == ["adapter_config.json", "adapter_model.safetensors"]
    kinds = {
        c.checkpoint_type for c in client.list_checkpoints(training.model_id).result().checkpoints
    }
    assert kinds == {"external"}
    refused(
        lambda: training.save_weights_external("e2", age_encryption_recipients=["age1x"]).result(),
        "age",
    )
    state = training.save_state("t1").result().path
    copied = client.copy_weights(state, "project").result()
    assert client.get_weights_info_by_tinker_path(copied).result().lora_rank == 4
    session = training.model_id.partition(":")[0]
    search = types.SessionSearchRequest(session_id=session)
    assert [s.session_id for s in client.search_sessions(search).result().sessions] == [session]
    sampler = now(service.create_sampling_client(base_model=BASE_MODEL))
    settings = {"max_tokens": 5, "seed": 1}
    same = drawn(sampler, 1, **settings)
    handle = type(sampler).from_sampler_handle(sampler.get_sampler_handle())
    assert drawn(now(handle), 1, **settings) == same
    assert drawn(pickle.loads(pickle.dumps(sampler)), 1, **settings) == same
    assert client.get_sampler(sampler._sampling_session_id).result().base_model == BASE_MODEL
    trace = urllib.request.urlopen(client.export_session_trace(session).result()).read()
    assert b"weights/t1" in trace
    said = [
        refused(lambda: client.assign_session_project(session, "p").result(), "one project"),
        refused(lambda: tinker.AdminClient().get_audit_log().result(), "audit"),
        refused(
            lambda: (
                tinker.AdminClient()
                .get_billing_usage("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z")
                .result()
            ),
            "billed",
        ),
        refused(lambda: client.whoami().result()),
    ]
    return {"said": said}


def cli(service: Any) -> Any:
    """The `tinker` command lists, gives a life, downloads, deletes."""
    training = small_model(service)
    state = training.save_state("t1").result().path
    command = Path(sys.executable).parent / "tinker"

    def said(*parts: str) -> Any:
        done = subprocess.run(
            [command, "-f", "json", *parts],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{parts}: {done.stdout}{done.stderr}"
        return done.stdout

    assert training.model_id in said("run", "list", "--limit", "0")
    assert training.model_id in said("run", "info", training.model_id)
    assert state in said("checkpoint", "list", "--run-id", training.model_id)
    assert state in said("checkpoint", "list", "--limit", "0")
    assert "null" in said("checkpoint", "info", state)
    said("checkpoint", "set-ttl", state, "--ttl", "7200")
    assert '"expires_at": null' not in said("checkpoint", "info", state)
    said("checkpoint", "set-ttl", state, "--remove")
    said("checkpoint", "publish", state)
    said("checkpoint", "unpublish", state)
    with tempfile.TemporaryDirectory() as folder:
        said("checkpoint", "download", state, "-o", folder)
        files = {each.name for each in Path(folder).rglob("*") if each.is_file()}
        trace = Path(folder, "trace")
        session = training.model_id.partition(":")[0]
        said("session", "export-trace", session, "--output", str(trace))
        assert b"weights/t1" in trace.read_bytes()
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files, files
    said("checkpoint", "delete", state, "-y")
    assert state not in said("checkpoint", "list", "--run-id", training.model_id)
    assert BASE_MODEL in said("model", "list")
    return {"files": sorted(files)}


PROGRAMS: dict[str, Callable[[Any], Any]] = {each.__name__: each for each in (rest, newer, cli)}

if __name__ == "__main__":
    run(PROGRAMS[sys.argv[1]])
