"""`tinsmith config`, and the page of settings."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tinsmith import cli
from tinsmithd.config import SECTIONS
from tinsmithd.config.page import page

ROOT = Path(__file__).parent.parent.parent


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `tinsmith config`."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["config", *argv])
    captured = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, captured.out, captured.err


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file and variables, and none of other tests' clusters; returns the file."""
    for name in list(os.environ):
        if name.startswith(tuple(f"TINSMITH_{section.upper()}_" for section in SECTIONS)):
            monkeypatch.delenv(name)
    file = tmp_path / "config.toml"
    file.write_text("[training]\n\nmodels_max = 2\nrank_max = 3\n[trainer]\nranks = 4\n")
    monkeypatch.setenv("TINSMITH_CONFIG", str(file))
    monkeypatch.setenv("TINSMITH_TRAINING_RANK_MAX", "30")
    monkeypatch.setenv("TINSMITH_TRAINER_LAUNCH_TOKEN", "hush")
    return file


def test_each_value_has_its_origin(capsys: pytest.CaptureFixture[str], outside: Path) -> None:
    """Flag, variable, line of the file, default; and the default of what is changed."""
    status, out, _ = run(capsys, "--json", "training", "--lane-calls-max", "5")
    found: dict[str, dict[str, Any]] = json.loads(out)["training"]
    assert status == 0
    assert list(found) == list(SECTIONS["training"].model_fields)
    assert {
        key: (found[key]["value"], found[key]["default"], found[key]["origin"])
        for key in ("models_max", "rank_max", "lane_calls_max", "chunks_max")
    } == {
        "models_max": (2, 64, f"{outside}:3"),
        "rank_max": (30, 256, "TINSMITH_TRAINING_RANK_MAX"),
        "lane_calls_max": (5, 256, "--lane-calls-max"),
        "chunks_max": (1024, 1024, "default"),
    }
    assert found["chunks_max"]["description"] == "Chunks of one datum's input."


def test_without_a_section_all_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """With what must be set, which stops no other process; a secret is not shown."""
    status, out, err = run(capsys)
    lines = [line.split() for line in out.splitlines()]
    assert (status, err) == (0, "")
    assert [line[0] for line in lines if line and line[0].startswith("[")] == [
        f"[{section}]" for section in SECTIONS
    ]
    assert ["base_model", "(must", "be", "set)", "nowhere"] in lines
    assert "hush" not in out
    assert any(line[:2] == ["launch_token", "**********"] for line in lines)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sampler"], "tinsmith: sampler.base_model: must be set"),
        (["training", "--models-mux", "1"], "tinsmith: --models-mux: unknown flag"),
        (["training", "--models-max", "0"], "tinsmith: training.models_max: must be at least 1"),
        (["--config", "/absent.toml"], "tinsmith: /absent.toml: is no file"),
    ],
)
def test_what_would_stop_a_process_is_said(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    """With status 1; what can be printed is."""
    status, _, err = run(capsys, *argv)
    assert status == 1
    assert err.startswith(message)


def test_the_client_does_not_import_pydantic() -> None:
    """It is the servers'."""
    code = "import sys, tinsmith, tinsmith.cli; print('pydantic' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "False\n"


def test_the_page_is_what_the_settings_say() -> None:
    """`make settings` writes it."""
    assert page() == (ROOT / "docs" / "settings.md").read_text(), "run `make settings`"
