"""A command whose cluster is away, is none, or lies: a sentence, a hint and a status, at once."""

import http.server
import json
import socket
import threading

import pytest

from commands import tinsmith
from faults.peer import Peer
from tinsmith import v1 as pb

HOSTILE = "\x1b[2J[bold]x[/]"


@pytest.mark.parametrize(
    "line",
    [
        ("status",),
        ("top", "--once"),
        ("models", "ls"),
        ("models", "show", "x"),
        ("models", "rm", "--yes", "x"),
        ("checkpoints", "ls"),
        ("checkpoints", "show", "tinsmith://x/weights/y"),
        ("checkpoints", "download", "tinsmith://x/weights/y", "{folder}"),
        ("checkpoints", "export", "tinsmith://x/weights/y", "{folder}/y.tar"),
        ("checkpoints", "ttl", "tinsmith://x/weights/y", "never"),
        ("checkpoints", "cp", "tinsmith://x/weights/y", "tinsmith://x/weights/z"),
        ("checkpoints", "rm", "--yes", "tinsmith://x/weights/y"),
        ("sample", "x"),
    ],
    ids=" ".join,
)
def test_nobody_answers(line: tuple[str, ...], tmp_path: pytest.TempPathFactory) -> None:
    """Every command that asks says where, and what to do."""
    words = [word.replace("{folder}", str(tmp_path)) for word in line]
    done = tinsmith(*words, "--address", "127.0.0.1:1")
    assert (done.status, done.out) == (3, "")
    assert done.err.startswith("tinsmith: 127.0.0.1:1 does not answer: ")
    assert "hint: `tinsmith up`" in done.err
    assert len(done.err.splitlines()) == 2
    error = json.loads(tinsmith(*words, "--json", "--address", "127.0.0.1:1").err)["error"]
    assert (error["status"], error["hint"] != "") == (3, True)


def test_a_server_that_says_nothing() -> None:
    """Is waited for as long as `--timeout` says."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        done = tinsmith("models", "ls", "--address", address, "--timeout", "0.3")
    assert done.status == 3
    assert f"{address} has not answered within 0.3 s" in done.err


def test_a_server_of_another_kind() -> None:
    """The gateway's address, for one, is not the Training server's."""
    handler = http.server.BaseHTTPRequestHandler
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        handler.log_message = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
        done = tinsmith("models", "ls", "--address", f"127.0.0.1:{web.server_port}")
        web.shutdown()
    assert done.status in (2, 3)
    assert len(done.err.splitlines()) <= 2


@pytest.mark.parametrize("address", ["", "host", "ftp://x:1", "x:1/y", "\x1b[2J"])
def test_an_address_that_is_none(address: str) -> None:
    done = tinsmith("models", "ls", "--address", address)
    assert done.status == 2
    assert "\x1b" not in done.err


def test_what_a_server_says_is_a_claim(peer: Peer) -> None:
    """Whatever it says, nothing moves the terminal and no time or state is believed."""
    peer.servicer.model = pb.Model(
        model_id=HOSTILE, base_model=HOSTILE, state=99, state_message=HOSTILE, step_count=-1
    )  # type: ignore[arg-type]
    peer.servicer.model.create_time.seconds = 2**60
    peer.servicer.model.user_metadata[HOSTILE] = HOSTILE
    shown = tinsmith("models", "show", "x", "--steps", "0", "--address", peer.address)
    assert (shown.status, shown.err) == (0, "")
    assert "\x1b" not in shown.out
    assert shown.out.count("\\x1b[2J[bold]x[/]") == 5
    found = tinsmith("models", "show", "x", "--steps", "0", "--json", "--address", peer.address)
    assert found.json["state_message"] == HOSTILE
    assert (found.json["create_time"], found.json["state"]) == (None, "99")


def test_a_fault_of_the_command_is_a_sentence(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it was raised is shown to who asks for it."""
    monkeypatch.setattr("tinsmith.cli.models.model_record", lambda _: 1 / 0)
    line = ("models", "show", "x", "--address", peer.address)
    done = tinsmith(*line)
    assert done.status == 1
    assert done.err.splitlines()[0] == "tinsmith: ZeroDivisionError: division by zero"
    assert "TINSMITH_TRACEBACK=1" in done.err
    with pytest.raises(ZeroDivisionError):
        tinsmith(*line, TINSMITH_TRACEBACK="1")


@pytest.mark.parametrize(
    "line",
    [
        ("nonsense",),
        ("models",),
        ("models", "show"),
        ("models", "ls", "--limit", "0"),
        ("models", "ls", "--nonsense"),
        ("checkpoints", "cp", "x"),
        ("sample", "x", "--temperature", "-1"),
        ("top", "--interval", "nan"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line(line: tuple[str, ...]) -> None:
    """Names what is wrong, and where to read more."""
    done = tinsmith(*line)
    assert (done.status, done.out) == (2, "")
    assert len(done.err.splitlines()) == 2
    assert "--help` says what there is" in done.err
