"""Each command that asks a cluster: its table, its JSON, its errors, through the wire."""

import contextlib
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import commands
import tinsmith
from clusters import RunningCluster
from commands import Done
from tinsmith import AdamParams, Datum, ModelInput
from tinsmith import v1 as pb
from tinsmith.cli import servers
from tinsmith.cli.text import prose
from tinsmith.cluster import Cluster
from tinsmithd.rpc.metrics import Metrics

Run = Callable[..., Done]
HOSTILE = "\x1b[2J[bold]x[/]\n:smile:\u202e"
WAIT_S = 60.0


@pytest.fixture
def run(cluster: RunningCluster, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs command lines on the shared cluster."""
    monkeypatch.setenv("TINSMITH_ADDRESS", cluster.address)
    monkeypatch.setattr(servers, "ASK_TIMEOUT_S", WAIT_S)  # a busy machine is no server away
    return commands.tinsmith


@pytest.fixture(scope="module")
def trained(cluster: RunningCluster, stubs: Cluster) -> Iterator[str]:
    """Id of a model that made two steps, with a checkpoint of either kind."""
    lora = pb.LoraConfig(rank=2, seed=1, train_unembed=False)
    request = pb.CreateModelRequest(lora_config=lora, user_metadata={"note": HOSTILE})
    model_id = stubs.training.CreateModel(request).model.model_id
    make_steps(cluster, model_id)
    with tinsmith.ServiceClient(base_url=cluster.address) as service:
        trainer = service.get_training_client(model_id).result()
        trainer.save_state("state").result()
        trainer.save_weights_for_sampler("weights").result()
    yield model_id
    stubs.training.DeleteModel(pb.DeleteModelRequest(model_id=model_id))


def make_steps(cluster: RunningCluster, model_id: str) -> None:
    """Two of them, with two tokens each."""
    with tinsmith.ServiceClient(base_url=cluster.address) as service:
        trainer = service.get_training_client(model_id).result()
        inputs = {"target_tokens": np.array([6, 7])}
        for _ in range(2):
            trainer.forward_backward([Datum(ModelInput.from_ints([5, 6]), inputs)], "cross_entropy")
            trainer.optim_step(AdamParams(learning_rate=0.01)).result()


def weights_of(model_id: str) -> str:
    return f"tinsmith://{model_id}/sampler_weights/weights"


def fresh(stubs: Cluster) -> str:
    """Id of a model of this test's own."""
    lora = pb.LoraConfig(rank=1, seed=1)
    return stubs.training.CreateModel(pb.CreateModelRequest(lora_config=lora)).model.model_id


def failed(done: Done, status: int) -> dict[str, object]:
    """What a command with `--json` says of its error; its status is this one."""
    assert done.status == status, done
    assert done.out == ""
    error: dict[str, object] = json.loads(done.err)["error"]
    assert error["status"] == status
    return error


# --- looking -------------------------------------------------------------------------------------


def test_status(run: Run, cluster: RunningCluster, trained: str) -> None:
    """All servers, what they serve and what waits."""
    found = run("status", "--json").json
    servers = {server["service"]: server for server in found["servers"]}
    assert {name: server["address"] for name, server in servers.items()} == dict(cluster.addresses)
    assert {server["health"] for server in servers.values()} == {"serving"}
    assert {server["version"] for server in servers.values()} == {tinsmith.__version__}
    assert servers["training"]["base_models"][0]["name"] == cluster.base_model
    assert (found["ranks"], found["durability"]) == (1, "fsync")
    assert found["models"] == sum(found["models_by_state"].values()) >= 1
    assert found["pending_calls"] >= 0
    assert found["checkpoints"] >= 2
    done = run("status")
    assert (done.status, done.err) == (0, "")
    for text in (*cluster.addresses.values(), "serving", "deepspeed", cluster.base_model, "fsync"):
        assert text in done.out


def test_status_says_which_server_is_away(run: Run, cluster: RunningCluster) -> None:
    """And ends with status 1; the others are shown."""
    done = run("status", TINSMITH_ADDRESS_SAMPLER="127.0.0.1:1")
    assert done.status == 1
    assert re.search(r"127\.0\.0\.1:1 +unreachable", done.out)
    assert done.out.count(" serving ") == 2
    both = f"{cluster.addresses['sampler']},127.0.0.1:1"
    found = run("status", "--json", TINSMITH_ADDRESS_SAMPLER=both).json["servers"]
    assert [(s["service"], s["health"]) for s in found] == [
        ("training", "serving"),
        ("sampler", "serving"),
        ("sampler", "unreachable"),
        ("checkpoint", "serving"),
    ]


def test_top(run: Run, cluster: RunningCluster, stubs: Cluster) -> None:
    """The models that were called last, with what they did in the last minute."""
    model_id = fresh(stubs)
    make_steps(cluster, model_id)
    frame = run("top", "--once", "--json").json
    model = frame["models"][0]
    assert model["model_id"] == model_id
    assert model["steps_per_minute"] == 2.0
    assert model["tokens_per_second"] == pytest.approx(4 / 60)
    assert model["loss"] > 0
    done = run("top")  # no terminal: once
    assert done.status == 0
    assert model_id in done.out
    assert "STEPS/MIN" in done.out
    stubs.training.DeleteModel(pb.DeleteModelRequest(model_id=model_id))


def test_metrics(run: Run) -> None:
    """Of a server that has some; their answer also says what time it is there."""
    metrics = Metrics()
    try:
        at = f"127.0.0.1:{metrics.serve('127.0.0.1:0')}"
        (server,) = run("top", "--once", "--json", "--metrics", at).json["servers"]
        assert (server["metrics"], server["memory_bytes"] > 1e6) == (at, True)
        assert server["sampled_tokens_per_second"] is None
        assert "MEMORY MB" in run("top", "--metrics", f"http://{at}/metrics").out
        found = run("doctor", "--json", "--metrics", at).json["findings"]
        assert next(f for f in found if f["check"] == "clock")["found"] == f"it is that of {at}"
    finally:
        metrics.close()


def test_metrics_that_are_not_there(run: Run) -> None:
    done = run("top", "--once", "--json", "--metrics", "127.0.0.1:1")
    assert "metrics_address" in str(failed(done, 3)["hint"])


def test_doctor(run: Run, cluster: RunningCluster, tmp_path: Path, trained: str) -> None:
    """Nothing is wrong with this cluster."""
    found = run("doctor", "--json", "--data", str(tmp_path)).json["findings"]
    by_check = {each["check"]: each for each in found}
    for check in ("connection", "training", "sampler", "checkpoint", "versions", "clock"):
        assert by_check[check]["state"] == "ok", by_check[check]
    assert "ports" not in by_check
    shown = run("doctor", "--data", str(tmp_path)).out
    assert cluster.addresses["sampler"] in shown
    lost = run("doctor", "--json", TINSMITH_ADDRESS_CHECKPOINT="127.0.0.1:1")
    by_check = {each["check"]: each for each in lost.json["findings"]}
    assert lost.status == 1
    assert "TINSMITH_ADDRESS_CHECKPOINT" in by_check["checkpoint"]["hint"]


# --- models --------------------------------------------------------------------------------------


def test_models_ls(run: Run, stubs: Cluster, trained: str) -> None:
    """Newest first, as many as are asked for."""
    newest = fresh(stubs)
    records = run("models", "ls", "--limit", "100000", "--json").json["models"]
    assert records[0]["model_id"] == newest
    by_id = {record["model_id"]: record for record in records}
    assert by_id[trained]["step_count"] == 2
    assert by_id[trained]["tuning"]["rank"] == 2
    assert by_id[trained]["user_metadata"] == {"note": HOSTILE}
    assert len(run("models", "ls", "--limit", "1", "--json").json["models"]) == 1
    done = run("models", "ls")
    assert "lora 2 (attn, mlp)" in done.out
    assert trained in done.out
    stubs.training.DeleteModel(pb.DeleteModelRequest(model_id=newest))


def test_models_show(run: Run, trained: str) -> None:
    """With its newest steps; what its user wrote does not move the terminal."""
    found = run("models", "show", trained, "--json").json
    assert [step["step_count"] for step in found["steps"]] == [2, 1]
    assert found["steps"][0]["metrics"]["tokens:sum"] == 2
    shown = run("models", "show", trained, "--steps", "1").out
    assert "\\x1b[2J[bold]x[/]\\n:smile:\\u202e" in shown
    assert "\x1b" not in shown
    assert "GRAD NORM" in shown


def test_models_rm(run: Run, stubs: Cluster) -> None:
    """Only after a yes; the second time there is none."""
    model_id = fresh(stubs)
    assert "--yes" in str(failed(run("models", "rm", model_id, "--json"), 2)["hint"])
    assert stubs.training.GetModel(pb.GetModelRequest(model_id=model_id)).model
    done = run("models", "rm", "--yes", model_id)
    assert (done.status, f"deleted {model_id}" in done.err) == (0, True)
    error = failed(run("models", "rm", "--yes", model_id, "--json"), 4)
    assert (error["reason"], "models ls" in str(error["hint"])) == ("MODEL_NOT_FOUND", True)


def test_an_error_for_a_person(run: Run) -> None:
    """One sentence and a hint, and nothing of where it was raised."""
    done = run("models", "show", "\x1b[2Jabsent")
    first, hint = done.err.splitlines()
    assert (done.status, done.out) == (4, "")
    assert first.startswith("tinsmith: ")
    assert first.endswith("(MODEL_NOT_FOUND)")
    assert hint.startswith("  hint: ")
    assert "\x1b" not in done.err


# --- checkpoints ---------------------------------------------------------------------------------


def test_checkpoints_ls(run: Run, trained: str) -> None:
    """Of a model and of a kind."""
    records = run("checkpoints", "ls", "--model", trained, "--json").json["checkpoints"]
    assert [(r["kind"], r["name"]) for r in records] == [
        ("sampler", "weights"),
        ("training", "state"),
    ]
    kinds = ("checkpoints", "ls", "--model", trained, "--kind", "training")
    shown = run(*kinds).out
    assert f"tinsmith://{trained}/weights/state" in shown
    assert "sampler" not in shown
    assert run("checkpoints", "ls", "--kind", "other").status == 2


def test_checkpoints_show(run: Run, trained: str) -> None:
    path = weights_of(trained)
    found = run("checkpoints", "show", path, "--json").json
    assert {file["name"] for file in found["files"]} >= {"adapter_model.safetensors"}
    assert len(found["digest"]) == 64
    shown = run("checkpoints", "show", path).out
    assert found["files"][0]["sha256"] in shown
    assert failed(run("checkpoints", "show", "nonsense", "--json"), 2)["reason"] == "INVALID_NAME"


def test_checkpoints_download_and_export(run: Run, trained: str, tmp_path: Path) -> None:
    """The same files, as a folder and as an archive that is whole or not there."""
    path, folder, file = weights_of(trained), tmp_path / "adapter", tmp_path / "adapter.tar"
    assert run("checkpoints", "download", path, str(folder)).out == f"{folder}\n"
    found = run("checkpoints", "export", path, str(file), "--json").json
    assert found["size_bytes"] == file.stat().st_size
    with tarfile.open(file) as archive:
        assert sorted(archive.getnames()) == sorted(each.name for each in folder.iterdir())
    error = failed(run("checkpoints", "export", path, str(file), "--json"), 5)
    assert "--force" in str(error["hint"])
    before = file.read_bytes()
    assert run("checkpoints", "export", path, str(file), "--force").status == 0
    assert file.read_bytes() == before
    absent = path.replace("weights/weights", "weights/absent")
    assert failed(run("checkpoints", "export", absent, f"{file}2", "--json"), 4)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["adapter", "adapter.tar"]
    done = run("checkpoints", "export", path, str(tmp_path / "none" / "x.tar"))
    assert done.status == 1
    assert "No such file or directory" in done.err


def test_checkpoints_cp_ttl_and_rm(run: Run, trained: str) -> None:
    """A copy lives its own life."""
    path = f"tinsmith://{trained}/weights/state"
    copy = f"{path}-2"
    made = run("checkpoints", "cp", path, copy, "--ttl", "1h", "--json").json
    assert (made["checkpoint_path"], made["expire_time"] is None) == (copy, False)
    assert (
        failed(run("checkpoints", "cp", path, copy, "--json"), 5)["reason"] == "CHECKPOINT_EXISTS"
    )
    assert "in 7 d" in run("checkpoints", "ttl", copy, "7d").out
    assert "for ever" in run("checkpoints", "ttl", copy, "never").out
    assert run("checkpoints", "ttl", copy, "soon").status == 2
    assert run("checkpoints", "ttl", copy, "0").status == 2
    assert run("checkpoints", "rm", "--yes", copy, "--json").json == {"deleted": [copy]}
    assert failed(run("checkpoints", "rm", "--yes", copy, "--json"), 4)
    assert run("checkpoints", "show", path).status == 0


# --- sample --------------------------------------------------------------------------------------


def test_sample(run: Run, trained: str) -> None:
    """The same seed gives the same text, from the base model and from a checkpoint."""
    line = ("sample", "Hello", "--seed", "3", "--max-tokens", "12")
    streamed, whole = run(*line), run(*line, "--json").json
    (one,) = whole["samples"]
    assert (whole["prompt_tokens"], len(one["logprobs"])) == (5, len(one["tokens"]))
    assert one["stop_reason"] in ("length", "stop")
    assert streamed.out == prose(one["text"]) + "\n"
    assert f"5 + {len(one['tokens'])} tokens" in streamed.err
    tuned = run(*line, "--checkpoint", weights_of(trained), "--json").json["samples"][0]
    assert tuned["tokens"] != one["tokens"]


def test_sample_of_a_chat_and_several(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt as the chat template has it, or from standard input."""
    line = ("sample", "-", "--max-tokens", "2", "--temperature", "0", "--json")
    for chat, prompt in ((("--chat",), "<user>hi\n<assistant>"), ((), "hi")):
        monkeypatch.setattr("sys.stdin", io.StringIO("hi"))
        assert run(*line, *chat).json["prompt_tokens"] == len(prompt)
    shown = run("sample", "x", "-n", "2", "--max-tokens", "2").out
    assert ("--- 1 of 2" in shown, "--- 2 of 2" in shown) == (True, True)
    assert failed(run("sample", "x", "--system", "y", "--json"), 2)
    assert failed(run("sample", "x", "--base-model", "none", "--json"), 4)
    assert failed(run("sample", "x", "--checkpoint", "tinsmith://a/sampler_weights/b", "--json"), 4)


# --- as processes --------------------------------------------------------------------------------


def process(cluster: RunningCluster, *argv: str, **more: object) -> "subprocess.Popen[bytes]":
    """A command line in a process of its own."""
    path = os.pathsep.join(part for part in sys.path if part)
    env = {**os.environ, "TINSMITH_ADDRESS": cluster.address, "PYTHONPATH": path, "TERM": "xterm"}
    command = [sys.executable, "-m", "tinsmith.cli", *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    return subprocess.Popen(command, env=env, **pipes)  # type: ignore[call-overload, no-any-return]


def test_ctrl_c_and_a_reader_that_has_gone(cluster: RunningCluster, trained: str) -> None:
    """Both are quiet, and have the statuses that shells give them."""
    line = ("top", "--json", "--interval", "0.2")
    with process(cluster, *line) as stopped, process(cluster, *line) as unread:
        for each in (stopped, unread):
            assert each.stdout is not None
            assert trained in each.stdout.readline().decode()
        stopped.send_signal(signal.SIGINT)
        assert unread.stdout is not None
        unread.stdout.close()
        assert (stopped.wait(WAIT_S), unread.wait(WAIT_S)) == (130, 141)
        for each in (stopped, unread):
            assert each.stderr is not None
            assert each.stderr.read() == b""


def test_top_on_a_terminal(cluster: RunningCluster, trained: str) -> None:
    """It is drawn again and again; Ctrl-C gives the cursor back."""
    leader, follower = pty.openpty()
    with process(cluster, "top", "--interval", "0.2", stdout=follower, stderr=follower) as live:
        os.close(follower)
        shown = b""
        while shown.count(b"Calls that wait") < 2:
            shown += os.read(leader, 65_536)
        live.send_signal(signal.SIGINT)
        # Until nobody has the other end: who is not read from cannot end.
        with contextlib.suppress(OSError):
            while more := os.read(leader, 65_536):
                shown += more
        assert live.wait(WAIT_S) == 130
    os.close(leader)
    assert shown.rstrip().endswith(b"\x1b[?25h")
    assert b"Traceback" not in shown


def test_completion_offers_what_the_cluster_has(cluster: RunningCluster, trained: str) -> None:
    """Ids after `models show`; nothing, and no error, where nobody answers."""
    path = os.pathsep.join(part for part in sys.path if part)
    patient = f"from tinsmith.cli import complete; complete.TIMEOUT_S = {WAIT_S}; "
    for address, offered, before in ((cluster.address, trained, patient), ("127.0.0.1:1", "", "")):
        env = {
            **os.environ,
            "TINSMITH_ADDRESS": address,
            "PYTHONPATH": path,
            "_TINSMITH_COMPLETE": "complete_bash",
            "COMP_WORDS": f"tinsmith models show {trained[:6]}",
            "COMP_CWORD": "3",
        }
        done = subprocess.run(
            [sys.executable, "-c", f"{before}from tinsmith.cli import main; main()"], env=env,
            capture_output=True, text=True, timeout=2 * WAIT_S, check=False,
        )  # fmt: skip
        assert (done.stdout.strip(), done.stderr) == (offered, "")
