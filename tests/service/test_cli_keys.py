"""The command on a cluster with keys, whose file it looks after."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from commands import Done, tinsmith
from keyed import Keyed

Run = Callable[..., Done]
SEEN_S_MAX = 30.0


@pytest.fixture
def run(keyed: Keyed, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs command lines on the cluster with keys; nobody's key is in the environment."""
    monkeypatch.setenv("TINSMITH_ADDRESS", keyed.cluster.address)
    for name in ("TINSMITH_API_KEY", "TINKER_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return tinsmith


def until_status(run: Run, key: str, status: int) -> Done:
    """What `models ls` says with a key once it ends like this."""
    end_s = time.monotonic() + SEEN_S_MAX
    while (done := run("models", "ls", "--json", TINSMITH_API_KEY=key)).status != status:
        assert time.monotonic() < end_s, done
        time.sleep(0.05)
    return done


def test_a_key_of_the_command_is_good_until_it_is_revoked(run: Run, keyed: Keyed) -> None:
    """Without a restart; who has it sees what its tenant owns."""
    file = ("--file", str(keyed.keys.path))
    made = run("keys", "create", *file, "--tenant", "carol", "--json").json
    assert until_status(run, made["key"], 0).json == {"models": []}
    assert run("keys", "revoke", *file, "--yes", made["key_id"]).status == 0
    error = json.loads(until_status(run, made["key"], 6).err)["error"]
    assert error["reason"] == "UNAUTHENTICATED"


def test_without_a_key(run: Run, tmp_path: Path) -> None:
    """Every command says so, and how a key is shown; the doctor finds it."""
    for line in (
        ("status",),
        ("top", "--once"),
        ("models", "ls"),
        ("checkpoints", "ls"),
        ("checkpoints", "export", "tinsmith://m/weights/n", str(tmp_path / "x.tar")),
        ("sample", "x"),
    ):
        done = run(*line)
        assert done.status == 6, done
        assert done.err.splitlines()[0].endswith("(UNAUTHENTICATED)")
        assert "TINSMITH_API_KEY" in done.err
    assert not list(tmp_path.iterdir())
    found = {f["check"]: f for f in run("doctor", "--json").json["findings"]}
    assert (found["key"]["state"], "training" in found["key"]["found"]) == ("wrong", True)
    bad = run("models", "ls", TINSMITH_API_KEY="a\nb")
    assert (bad.status, "a\nb" in bad.err) == (2, False)


def test_tenants_do_not_see_each_other(run: Run, keyed: Keyed) -> None:
    """What is somebody else's is as if it were not there; who may only read changes nothing."""
    bobs = keyed.create("bob", "cli-model")
    for name, there in (("bob", True), ("alice", False), ("bob's reader", True)):
        key = keyed.key(name)
        listed = run("models", "ls", "--json", TINSMITH_API_KEY=key).json["models"]
        assert (bobs in [model["model_id"] for model in listed]) == there
        assert run("models", "show", bobs, TINSMITH_API_KEY=key).status == (0 if there else 4)
    line = ("models", "rm", "--yes", bobs)
    assert run(*line, TINSMITH_API_KEY=keyed.key("alice")).status == 4
    assert run(*line, TINSMITH_API_KEY=keyed.key("bob's reader")).status == 6
    done = run("doctor", "--json", TINSMITH_API_KEY=keyed.key("bob"))
    assert {f["check"]: f["state"] for f in done.json["findings"]}["key"] == "ok"
    assert keyed.key("bob") not in done.out
    assert run(*line, TINSMITH_API_KEY=keyed.key("bob")).status == 0
