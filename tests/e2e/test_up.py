"""`tinsmith up`: what a person sees, and that nothing outlives it."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path

import grpc
import pytest

import programs
from clusters import children
from tinsmith import v1 as pb
from tinsmithd.processes.template.client import SOCKET_VARIABLE
from tinsmithd.up import gateway
from wire import reason_and_field

START_S_MAX = 150
"""Four servers import torch and its friends, beside other tests."""


started: list[subprocess.Popen[str]] = []

HOSTILE_MODULES = ("queue", "resource", "tinsmithd", "grpc", "torch")


def up(
    base_model: Path,
    data: Path,
    *arguments: str,
    folder: Path | None = None,
    forked: bool = False,
) -> subprocess.Popen[str]:
    """Start the command; its programs start as for a person, unless they are to be forked."""
    environment = programs.variables()
    if not forked:
        environment.pop(SOCKET_VARIABLE, None)
    fixed = ("up", "--base-model", str(base_model), "--data", str(data), "--port", "0")
    # As the installed command does it: its own folder is on its path, the current one is not.
    command = [sys.executable, "-P", "-m", "tinsmithd.up", *fixed, "--threads", "1", *arguments]
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    started.append(process)
    return process


@pytest.fixture(autouse=True)
def nothing_outlives_a_test() -> Iterator[None]:
    """Servers end with `up`, whatever became of the test that started it."""
    yield
    while started:
        process = started.pop()
        process.kill()
        process.wait()


def servers(process: subprocess.Popen[str]) -> dict[str, int]:
    """Process ids of the servers that run now, by name."""
    found = {}
    for pid in children(process.pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            names = [word.removeprefix("tinsmithd.") for word in words if "tinsmithd." in word]
            found.update(dict.fromkeys(names[:1], pid))
    return found


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until_silent(ports: list[int]) -> None:
    """Return when nothing listens on any of the ports; the test's timeout is the limit."""
    while any(map(listens, ports)):
        time.sleep(0.1)


def ports_of(banner: str) -> list[int]:
    names = "Training|Sampler|Checkpoint|Gateway"
    found = re.findall(rf"^  (?:{names}) +127\.0\.0\.1:(\d+)$", banner, re.M)
    assert len(found) == 4, banner
    return [int(port) for port in found]


def test_it_runs_a_command_and_ends_with_its_status(tiny_model: Path, tmp_path: Path) -> None:
    """Start-up says what it loads; the command finds the cluster; nothing is left.

    No server runs code of the current folder, and no file of theirs is for other users.
    """
    code = (
        "import os, sys, urllib.request, tinsmith; "
        "print(tinsmith.ServiceClient().get_server_capabilities()); "
        "url = os.environ['OPENAI_BASE_URL']; "
        "assert url == os.environ['TINKER_BASE_URL'] + '/v1'; "
        "assert os.environ['TINSMITH_HTTP_URL'] == os.environ['TINKER_BASE_URL']; "
        "print(url, urllib.request.urlopen(url + '/models').read()); sys.exit(7)"
    )
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    for name in HOSTILE_MODULES:
        (hostile / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})")
    data = tmp_path / "data"
    process = up(tiny_model, data, "--", sys.executable, "-P", "-c", code, folder=hostile)
    out, error = process.communicate(timeout=START_S_MAX)
    assert process.returncode == 7, out + error
    assert "loading tiny-llama" in error
    assert "Tinsmith is ready: tiny-llama" in out
    assert "SupportedModel(model_name='tiny-llama'" in out
    url = re.findall(r"^OPENAI_BASE_URL=(http://127.0.0.1:\d+/v1)$", out, re.M)[0]
    assert f"TINKER_BASE_URL={url.removesuffix('/v1')}\n" in out
    assert re.search(rf"^{url} .*\"id\":\"tiny-llama\"", out, re.M)
    wait_until_silent(ports_of(out))
    assert not (tmp_path / "ran").exists(), "code of the current folder ran in a server"
    others = [path for path in data.rglob("*") if path.is_file() and path.stat().st_mode & 0o077]
    assert not others, "what is on disk is for its user alone"
    assert {log.name for log in (data / "logs").iterdir()} == {
        "training.log",
        "sampler.log",
        "checkpoint.log",
        "gateway.log",
    }


def _read_banner(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    banner = ""
    while "Ctrl-C" not in banner:
        line = process.stdout.readline()
        assert line, "it ended before it was ready"
        banner += line
    return banner


def test_a_death_while_starting_is_a_death_like_any_and_no_reader_is_needed(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Each server is killed in its first moments, nobody reads what `up` says on standard error,
    and callers make servers log more than any pipe holds: it starts, serves, brings back what dies,
    and ends with status 0 on Ctrl-C."""
    process = up(tiny_model, tmp_path)
    for name in ("checkpoint", "sampler", "training", "gateway"):
        while name not in servers(process):
            time.sleep(0.02)
        os.kill(servers(process)[name], signal.SIGKILL)
    ports = ports_of(_read_banner(process))
    assert all(map(listens, ports))
    text = "x\n" * 1_000_000
    *ports_of_grpc, gateway_port = ports
    for server, port in zip(("training", "sampler", "checkpoint"), ports_of_grpc, strict=True):
        for _ in range(3):
            _refused(server, port, text)
        killed = servers(process)[server]
        os.kill(killed, signal.SIGKILL)
        while not (servers(process).get(server, killed) != killed and listens(port)):
            time.sleep(0.05)
        _refused(server, port, text)
    os.kill(servers(process)["gateway"], signal.SIGKILL)
    while not _is_healthy(gateway_port):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(START_S_MAX) == 0
    assert process.stderr is not None
    said = process.stderr.read().splitlines()
    assert said[-1] == "stopping; Ctrl-C again ends everything at once"
    wait_until_silent(ports)


def _is_healthy(gateway_port: int) -> bool:
    try:
        with urllib.request.urlopen(
            f"http://127.0.0.1:{gateway_port}/healthz", timeout=5
        ) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_a_gateway_is_where_it_was_asked_for_or_nowhere(tmp_path: Path) -> None:
    """A port that was asked for and is taken is said at once."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = up(tmp_path, tmp_path / "data", "--gateway-port", str(port))
        _, error = process.communicate(timeout=START_S_MAX)
        assert process.returncode == 2
        assert f"port {port} is taken" in error
        assert not gateway.is_free(port)
    assert gateway.is_free(port)
    assert gateway.loadable(Path("/models/small")) == "/./models/small"
    assert gateway.loadable(Path("/a/b/c")) == "/a/b/c"


def _refused(server: str, port: int, text: str) -> None:
    """Have a server refuse a text, and get its reason, as soon as it answers."""
    calls = {
        "training": lambda c: pb.TrainingServiceStub(c).GetModel,
        "sampler": lambda c: pb.SamplerServiceStub(c).GetTokenizer,
        "checkpoint": lambda c: pb.CheckpointServiceStub(c).GetCheckpoint,
    }
    requests = {
        "training": pb.GetModelRequest(model_id=text),
        "sampler": pb.GetTokenizerRequest(base_model=text),
        "checkpoint": pb.GetCheckpointRequest(checkpoint_path=text),
    }
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        while True:
            with pytest.raises(grpc.RpcError) as refusal:
                for _ in _answers(calls[server](channel)(requests[server], timeout=30)):
                    pass
            if refusal.value.code() is not grpc.StatusCode.UNAVAILABLE:
                break
            time.sleep(0.05)
    reason, _ = reason_and_field(refusal.value)
    assert reason in ("MODEL_NOT_FOUND", "BASE_MODEL_NOT_FOUND", "INVALID_NAME", "LIMIT_EXCEEDED")


def _answers(answer: object) -> Iterable[object]:
    return answer if isinstance(answer, Iterable) else [answer]


def test_only_a_server_that_says_hopeless_ends_up(tmp_path: Path) -> None:
    """A folder without a model: one line says so, and no server is left."""
    (tmp_path / "nothing").mkdir()
    process = up(tmp_path / "nothing", tmp_path / "data", forked=True)
    _, error = process.communicate(timeout=START_S_MAX)
    assert process.returncode == 1
    assert re.search(r"^tinsmith: the (sampler|training) server cannot start; ", error, re.M), error


def test_servers_end_with_a_killed_starter(tiny_model: Path, tmp_path: Path) -> None:
    """kill -9 of `up`: all are gone."""
    process = up(tiny_model, tmp_path)
    ports = ports_of(_read_banner(process))
    process.kill()
    process.communicate()
    wait_until_silent(ports)


def test_a_cluster_speaks_tls_with_certificates_of_its_own(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Servers, ranks, gateway and the program that it runs; nobody without its authority. Servers
    call the Checkpoint server at a port of their own."""
    log = tmp_path / "data" / "logs" / "checkpoint.log"
    code = (
        "import os, re, urllib.request, grpc, tinsmith; "
        "address = os.environ['TINSMITH_ADDRESS']; "
        "service = tinsmith.ServiceClient(); "
        "trainer = service.create_lora_training_client('tiny-llama', rank=2); "
        "print(trainer.result().save_weights_and_get_sampling_client().sample("
        "tinsmith.ModelInput.from_ints([1]), 1, tinsmith.SamplingParams(max_tokens=1)).result()); "
        "print(urllib.request.urlopen(os.environ['OPENAI_BASE_URL'] + '/models').status); "
        f"said = open({str(log)!r}).read(); "
        "port = re.search(r'servers call at 127.0.0.1:(\\d+), with TLS', said)[1]; "
        "rows = [line.split() for name in ('tcp', 'tcp6') for line in open(f'/proc/net/{name}')]; "
        "theirs = [r for r in rows if r[2].endswith(f':{int(port):04X}') and r[3] == '01']; "
        "print('callers:', len(theirs)); "
        "del os.environ['TINSMITH_CA_FILE']; "
        "service = tinsmith.ServiceClient(); "
        "service.get_server_capabilities()"
    )
    data = tmp_path / "data"
    process = up(tiny_model, data, "--tls", "--", sys.executable, "-P", "-c", code, forked=True)
    out, error = process.communicate(timeout=START_S_MAX)
    assert process.returncode == 1, out + error
    assert f"TINSMITH_CA_FILE={data / 'tls' / 'ca.pem'}\n" in out
    assert re.search(r"^TINKER_BASE_URL=https://127.0.0.1:\d+$", out, re.M)
    assert "sequences=[" in out
    assert "\n200\n" in out
    assert re.search(r"^callers: [2-9]$", out, re.M), "Training and Sampler"
    assert re.search("CERTIFICATE_VERIFY_FAILED: .* do not vouch for", error)
    others = [path for path in data.rglob("*") if path.is_file() and path.stat().st_mode & 0o077]
    assert not others, "what is on disk is for its user alone"
