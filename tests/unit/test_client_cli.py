"""The `tinsmith` command of a client alone says what is missing."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import tinsmith
from tinsmith import cli

ROOT = Path(__file__).parent.parent.parent


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command where nothing is installed but what the folder has."""
    path = f"{ROOT / 'client'}:{ROOT / 'services'}:{folder}"
    return subprocess.run(
        [sys.executable, "-S", "-m", "tinsmith.cli", *arguments],
        env={"PYTHONPATH": path, "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def client_alone(tmp_path: Path) -> Path:
    """A site-packages of what `pip install tinsmith` brings, and nothing else."""
    needed = ["grpcio", "protobuf", "numpy", "grpcio-status", "googleapis-common-protos"]
    for name in [*needed, "typing_extensions"]:
        for file in importlib.metadata.files(name) or []:
            top = file.parts[0]
            link = tmp_path / top
            if not link.exists() and not top.startswith(".."):
                link.symlink_to(Path(str(file.locate())).parents[len(file.parts) - 2] if len(
                    file.parts) > 1 else Path(str(file.locate())))  # fmt: skip
    return tmp_path


def test_the_client_alone_has_a_command_that_says_what_is_missing(client_alone: Path) -> None:
    """One line, no traceback, and how to get it; what needs no server works."""
    done = run(client_alone, "up", "--base-model", "x")
    assert done.returncode == 1
    assert "pip install 'tinsmith[server]'" in done.stderr
    assert "is not installed" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert run(client_alone, "version").stdout == f"tinsmith {tinsmith.__version__}\n"
    assert "up" in run(client_alone, "--help").stdout
    assert run(client_alone).returncode == 2


def test_what_an_extra_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the installed distribution says it, extras of extras too."""
    requires = [
        "numpy>=2.0",
        "no-such-light; extra == 'control'",
        'tinsmith[control]; extra == "server"',
        'torch>=2.8; extra == "server"',
        'no-such-heavy>=1; extra == "server"',
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: requires)
    assert cli.missing_for("server") == ["no-such-light", "no-such-heavy"]
    with pytest.raises(SystemExit, match="no-such-light, no-such-heavy is not installed"):
        cli.main(["up"])


def test_the_command_is_the_clients() -> None:
    """So that it is there without the servers."""
    text = (ROOT / "pyproject.toml").read_text()
    assert 'tinsmith = "tinsmith.cli:main"' in text
