"""What `tinsmith doctor` finds without a cluster; `--metrics` of a server that is not ours."""

import http.server
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from commands import Done, tinsmith
from tinsmith.cli.doctor import model_folder, remote
from tinsmith.cli.failures import Failed
from tinsmith.cli.metrics import Scrape, scrape

VARIABLES = ("TINSMITH_ADDRESS", "TINKER_BASE_URL", "http_proxy", "https_proxy", "grpc_proxy",
             "no_grpc_proxy", "no_proxy")  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of whoever runs the tests."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def findings(*argv: str, **variables: str) -> tuple[Done, dict[str, dict[str, str]]]:
    """Findings of the doctor by what was looked at."""
    done = tinsmith("doctor", "--json", *argv, **variables)
    return done, {each["check"]: each for each in done.json["findings"]}


def write_weights(path: Path, *, cut: int = 0) -> None:
    """A file as safetensors writes it, of one tensor of 8 bytes."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    path.write_bytes((struct.pack("<Q", len(header)) + header + bytes(8))[: -cut or None])


@pytest.fixture
def base_model(tmp_path: Path) -> Path:
    """A folder that has nothing wrong."""
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "tokenizer.json").write_text("{}")
    write_weights(tmp_path / "model.safetensors")
    return tmp_path


def _sharded(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    files = {"a": "1.safetensors", "b": "../../2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    write_weights(folder / "1.safetensors")


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def test_a_whole_base_model(base_model: Path) -> None:
    found = model_folder.finding(base_model)
    assert (found.state, "LlamaForCausalLM" in found.found) == ("ok", True)
    _sharded(base_model)
    write_weights(base_model / "2.safetensors")
    assert "2 file(s)" in model_folder.finding(base_model).found


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json is not there"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is no JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda f: write_weights(f / "model.safetensors", cut=3), "bytes of"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 99), "is no safetensors file"),
        (
            lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"nope"),
            "cannot be read",
        ),
        (
            lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com\n"),
            "pointer of git-lfs",
        ),
        (_sharded, "2.safetensors is not there"),
        (_pickled, "as pickles only"),
    ],
)
def test_what_is_wrong_with_a_base_model(
    base_model: Path, spoil: Callable[[Path], object], said: str
) -> None:
    """In a sentence that names the file."""
    spoil(base_model)
    done, found = findings("--here", "--base-model", str(base_model))
    assert done.status == 1
    assert found["base model"]["state"] == "wrong"
    assert said in found["base model"]["found"]


def test_this_machine_alone(tmp_path: Path) -> None:
    """Program, extras, disks and GPU; nothing of a cluster."""
    done, found = findings("--here", TINSMITH_CACHE=str(tmp_path / "cache"))
    assert {"program", "extras", "disk: data", "disk: cache", "GPU"} <= found.keys()
    assert str(tmp_path / "cache") in found["disk: cache"]["found"]
    assert not {"address", "connection"} & found.keys()
    assert done.status in (0, 1)  # this machine may have little room


def test_nobody_listens() -> None:
    """The connection says so, and which ports are taken by others."""
    with socket.socket() as taken, socket.socket() as probe:
        for each in (taken, probe):
            each.bind(("127.0.0.1", 0))
        taken.listen()
        port = probe.getsockname()[1]
        probe.close()
        done, found = findings("--address", f"127.0.0.1:{port}")
        assert done.status == 1
        assert found["connection"]["state"] == "wrong"
        assert "refused" in found["connection"]["found"]
        assert "--address" in found["address"]["found"]
        first = taken.getsockname()[1] - 2
        (ports,) = remote._ports(f"127.0.0.1:{first}")
        assert (ports.state, str(first + 2) in ports.found.rpartition("has ")[2]) == (
            "warning",
            True,
        )


def test_the_origin_of_an_address_and_a_bad_one() -> None:
    _, found = findings(TINSMITH_ADDRESS="localhost:1")
    assert "TINSMITH_ADDRESS" in found["address"]["found"]
    done, found = findings(TINKER_BASE_URL="ftp://x:1")
    assert (done.status, found["address"]["state"]) == (1, "wrong")
    assert "connection" not in found


def test_proxies_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of them, without its password; and variables that gRPC does not read."""
    monkeypatch.setenv("HTTPS_PROXY", "http://other:1")
    monkeypatch.setenv("https_proxy", "http://user:hush@proxy:3128")
    found = remote._proxies("cluster.example:50051")
    assert found.state == "warning"
    assert "proxy:3128" in found.found
    assert "hush" not in found.found + found.hint
    assert remote._proxies("127.0.0.1:1").state == "ok"
    monkeypatch.delenv("https_proxy")
    assert "does not read HTTPS_PROXY" in remote._proxies("cluster.example:50051").found


def test_names_that_lead_nowhere() -> None:
    found = remote._connection("no-such-host.invalid:50051")
    assert (found.state, "cannot be looked up" in found.found) == ("wrong", True)


@pytest.mark.parametrize(
    ("ahead_s", "state", "said"),
    [
        (0.0, "ok", ""),
        (-4.9, "ok", ""),
        (90.0, "warning", "ahead of"),
        (-7200.0, "warning", "behind"),
    ],
)
def test_clocks(ahead_s: float, state: str, said: str) -> None:
    found = remote._skew(ahead_s, "h:1")
    assert found.state == state
    assert said in found.found


# --- metrics ------------------------------------------------------------------------------------

PAGE = """# HELP tinsmith_x Things.
tinsmith_x{kind="a",name="q\\"}"} 2.0
tinsmith_x{kind="b"} 3 1700000000
tinsmith_y NaN
nonsense
broken{ 1
tinsmith_z +Inf
"""


@pytest.fixture
def serve() -> Iterator[Callable[[int, bytes], str]]:
    """A server of HTTP that answers each request alike."""
    running = []

    def start(status: int, body: bytes) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        running.append(server)
        return f"127.0.0.1:{server.server_port}"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def test_metrics_are_read(serve: Callable[[int, bytes], str]) -> None:
    """What is no line of metrics is passed over."""
    found = scrape(serve(200, PAGE.encode()))
    assert found.sum("tinsmith_x") == 5.0
    assert found.sum("tinsmith_x", kind="b") == 3.0
    assert found.sum("tinsmith_z") == float("inf")
    assert found.sum("nonsense") is None
    assert found.date_s is not None


@pytest.mark.parametrize(("status", "body"), [(404, b"no"), (200, b"x" * ((4 << 20) + 1))])
def test_what_are_no_metrics(serve: Callable[[int, bytes], str], status: int, body: bytes) -> None:
    with pytest.raises(Failed, match="no metrics at"):
        scrape(serve(status, body))


@pytest.mark.parametrize("address", ["x", "h:", "h:x", ":1"])
def test_bad_addresses_of_metrics(address: str) -> None:
    with pytest.raises(Failed, match="is not host:port"):
        scrape(address)


def test_rates_of_counters() -> None:
    """Of a server that was started anew, what it has counted since."""

    def at(taken_s: float, value: float) -> Scrape:
        return Scrape("h:1", {("c", ()): value}, taken_s)

    assert at(12.0, 30.0).rate(at(10.0, 10.0), "c") == 10.0
    assert at(12.0, 4.0).rate(at(10.0, 10.0), "c") == 2.0
    assert at(12.0, 4.0).rate(None, "c") is None
    assert at(12.0, 4.0).rate(at(10.0, 1.0), "absent") is None
