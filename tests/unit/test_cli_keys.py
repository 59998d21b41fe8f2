"""`tinsmith keys` looks after the file that servers read."""

import json
from pathlib import Path

import pytest

from commands import Done, tinsmith
from tinsmithd.keys import KeyRing, Scope


@pytest.fixture
def file(tmp_path: Path) -> str:
    """Where the keys are to be."""
    return str(tmp_path / "keys.json")


def keys(*argv: str) -> Done:
    return tinsmith("keys", *argv)


def test_a_key_is_made_listed_and_revoked(file: str) -> None:
    """The key is all of standard output, shown once; the servers' reader knows it until the end."""
    line = ("--tenant", "alice", "--scope", "read-only", "--expires", "30d", "--note", "laptop")
    made = keys("create", "--file", file, *line)
    assert (made.status, made.out.startswith("tml-")) == (0, True)
    caller = KeyRing(Path(file)).caller(made.out.strip())
    assert caller is not None
    assert (caller.owner, caller.scope) == ("alice", Scope.READ_ONLY)
    (record,) = keys("ls", "--file", file, "--json").json["keys"]
    assert record["key_id"] == caller.key_id
    assert (record["tenant"], record["scope"], record["note"]) == ("alice", "read-only", "laptop")
    shown = keys("ls", "--file", file)
    assert "in 30 d" in shown.out
    assert made.out.strip() not in shown.out + Path(file).read_text()
    assert keys("revoke", "--file", file, caller.key_id).status == 2  # nobody said yes
    gone = keys("revoke", "--file", file, "--yes", caller.key_id, "--json").json
    assert gone == {"revoked": [record]}
    assert KeyRing(Path(file)).caller(made.out.strip()) is None
    assert keys("ls", "--file", file, "--json").json == {"keys": []}


def test_json_of_a_new_key(file: str) -> None:
    made = keys("create", "--file", file, "--json").json
    assert made["key"].startswith("tml-")
    assert (made["tenant"], made["scope"], made["expire_time"]) == ("default", "tenant", None)


def test_limits_of_a_tenant(file: str) -> None:
    """Changed one by one, and back to what the settings say."""
    keys("create", "--file", file)
    assert "has the limits of the settings" in keys("limit", "--file", file, "alice").err
    both = ("tenant_models_max=50", "tenant_samples_max=0")
    changed = keys("limit", "--file", file, "alice", *both, "--json").json
    assert changed["limits"] == {"tenant_models_max": 50, "tenant_samples_max": 0}
    back = keys("limit", "--file", file, "alice", "tenant_models_max=default", "--json").json
    assert back == {"tenant": "alice", "limits": {"tenant_samples_max": 0}}
    assert "tenant_samples_max" in keys("limit", "--file", file, "alice").out


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        (("ls",), 1, "cannot read"),
        (("revoke", "--yes", "0" * 12), 1, "cannot read"),
        (("create", "--tenant", "a/b"), 1, "tenant: must match"),
        (("create", "--scope", "king"), 2, "king"),
        (("create", "--expires", "soon"), 2, "is no time span"),
        (("create", "--note", "a\x1b[2J"), 1, "note: must have"),
        (("limit", "alice", "x"), 2, "is not NAME=VALUE"),
        (("limit", "alice", "tenant_models_max=-1"), 2, "is not NAME=VALUE"),
    ],
)
def test_what_makes_no_sense(file: str, line: tuple[str, ...], status: int, said: str) -> None:
    """Is a sentence, and for programs JSON; no file is made."""
    done = keys(*line, "--file", file)
    assert (done.status, done.out, said in done.err) == (status, "", True)
    assert json.loads(keys(*line, "--file", file, "--json").err)["error"]["status"] == status
    assert not Path(file).exists()


def test_a_file_that_is_none(file: str) -> None:
    Path(file).write_text("{}")
    done = keys("ls", "--file", file)
    assert (done.status, "is no file of keys" in done.err) == (1, True)
    assert "Traceback" not in done.err
