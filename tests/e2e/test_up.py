"""`tinsmith up`: what a person sees, and that nothing outlives it."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

START_S_MAX = 60


def up(base_model: Path, data: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    fixed = ("up", "--base-model", str(base_model), "--data", str(data), "--port", "0")
    command = [sys.executable, "-m", "tinsmithd.up", *fixed, "--threads", "1", *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until_silent(ports: list[int]) -> None:
    """Return when nothing listens on any of the ports; the test's timeout is the limit."""
    while any(map(listens, ports)):
        time.sleep(0.1)


def ports_of(banner: str) -> list[int]:
    found = re.findall(r"^  (?:Training|Sampler|Checkpoint) +127\.0\.0\.1:(\d+)$", banner, re.M)
    assert len(found) == 3, banner
    return [int(port) for port in found]


def test_it_runs_a_command_and_ends_with_its_status(tiny_model: Path, tmp_path: Path) -> None:
    """Start-up says what it loads; the command finds the cluster; nothing is left."""
    code = (
        "import sys, tinsmith; "
        "print(tinsmith.ServiceClient().get_server_capabilities()); sys.exit(7)"
    )
    process = up(tiny_model, tmp_path, "--", sys.executable, "-c", code)
    out, error = process.communicate(timeout=START_S_MAX)
    assert process.returncode == 7, out + error
    assert "loading tiny-llama" in error
    assert "Tinsmith is ready: tiny-llama" in out
    assert "SupportedModel(model_name='tiny-llama'" in out
    wait_until_silent(ports_of(out))
    assert {log.name for log in (tmp_path / "logs").iterdir()} == {
        "training.log",
        "sampler.log",
        "checkpoint.log",
    }


def _read_banner(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    banner = ""
    while "Ctrl-C" not in banner:
        line = process.stdout.readline()
        assert line, "it ended before it was ready"
        banner += line
    return banner


def test_ctrl_c_stops_everything(tiny_model: Path, tmp_path: Path) -> None:
    """Status 0, within the grace of its servers."""
    process = up(tiny_model, tmp_path)
    ports = ports_of(_read_banner(process))
    assert all(map(listens, ports))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=START_S_MAX)
    assert process.returncode == 0
    wait_until_silent(ports)


def test_servers_end_with_a_killed_starter_and_a_killed_server_comes_back(
    tiny_model: Path, tmp_path: Path
) -> None:
    """kill -9 of one server: it is there again on its port. kill -9 of `up`: all are gone."""
    process = up(tiny_model, tmp_path)
    ports = ports_of(_read_banner(process))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    checkpoint = next(
        int(pid)
        for pid in children
        if b"tinsmithd.checkpoint" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    os.kill(checkpoint, signal.SIGKILL)
    wait_until_silent(ports[2:])
    while not listens(ports[2]):
        time.sleep(0.1)
    process.kill()
    process.communicate()
    wait_until_silent(ports)
