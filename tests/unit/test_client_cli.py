"""The `tinsmith` command of a client alone: all but the servers', and what is missing is said."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tinsmith
from laptops import PROJECT, needed, requirements, run, site_packages
from tinsmith import cli


@pytest.fixture(scope="module")
def client_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install tinsmith` brings, and nothing else."""
    return site_packages(tmp_path_factory.mktemp("client"))


def test_the_client_alone_has_all_commands_but_the_servers(client_alone: Path) -> None:
    """Of those it says in one line what is missing and how to get it."""
    done = run(client_alone, "up", "--base-model", "x")
    assert done.returncode == 1
    assert "pip install 'tinsmith[server]'" in done.stderr
    assert "is not installed" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert run(client_alone, "version").stdout == f"tinsmith {tinsmith.__version__}\n"
    helped = run(client_alone, "--help")
    assert {"up", "status", "models", "checkpoints", "doctor", "sample"} <= set(
        helped.stdout.split()
    )
    assert run(client_alone).returncode == 2
    away = run(client_alone, "models", "ls", "--address", "127.0.0.1:1")
    assert (away.returncode, away.stdout) == (3, "")
    assert len(away.stderr.splitlines()) == 2


def test_the_client_does_not_import_its_command() -> None:
    """Nor what that needs: they cost time at each start of a script."""
    code = "import sys, tinsmith, tinsmith.cli, tinsmith.cluster; print(sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    names = {name.partition(".")[0] for name in re.findall(r"'([\w.]+)'", done.stdout)}
    assert "grpc" in names
    assert not names & {"typer", "rich", "pygments", "pydantic", "transformers", "torch", "click"}


def test_no_extra_of_a_laptop_brings_torch() -> None:
    """What they need in turn included; that of the servers does."""
    laptop = needed(requirements("client", "examples"))
    assert "transformers" in laptop
    assert not laptop & {"torch", "deepspeed", "peft"}
    assert "torch" in needed(requirements("server"))


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
    assert PROJECT["scripts"]["tinsmith"] == "tinsmith.cli:main"
