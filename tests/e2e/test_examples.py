"""The examples, as a person runs them, in small, on a tiny model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from clusters import RunningCluster

EXAMPLES = Path(__file__).parents[2] / "client" / "examples"


def run(cluster: RunningCluster, name: str, *arguments: str) -> str:
    """Run an example to its end; returns what it printed."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "TINSMITH_ADDRESS": cluster.address,
    }
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    return [float(value) for value in re.findall(pattern, text)]


def test_sft_loop(cluster: RunningCluster, tmp_path: Path) -> None:
    """Held-out loss falls, far for a random model; curve and adapter are left."""
    out = run(
        cluster,
        *("sft_loop.py", "--out", str(tmp_path), "--learning-rate", "2e-2", "--steps", "60"),
    )
    found = re.search(r"held-out loss (\S+) → (\S+) nats", out)
    assert found is not None
    assert float(found[2]) < 0.6 * float(found[1])
    assert out.count("✗") + out.count("✓") == 12
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_rl_loop(cluster: RunningCluster) -> None:
    """Reward climbs."""
    out = run(
        cluster,
        *("rl_loop.py", "--steps", "12", "--learning-rate", "2e-2", "--group-size", "16"),
    )
    rewards = numbers(r"reward (\S+)", out)
    assert len(rewards) == 12
    assert sum(rewards[-3:]) / 3 > 2 * rewards[0] + 0.1


def test_dpo_loop(cluster: RunningCluster) -> None:
    """The held-out margin of chosen over rejected grows."""
    out = run(cluster, "dpo_loop.py", "--steps", "6", "--learning-rate", "5e-3")
    found = re.search(r"rejected: (\S+) → (\S+) nats", out)
    assert found is not None
    assert float(found[2]) > float(found[1]) + 1
    losses = numbers(r"loss (\S+)", out)
    assert losses[-1] < losses[0] == pytest.approx(0.693, abs=1e-3)


def test_stubs_only(cluster: RunningCluster) -> None:
    """Loss falls until greedy sampling gives the sequence back."""
    out = run(cluster, "stubs_only.py", "--steps", "40", "--learning-rate", "1e-2")
    losses = numbers(r"loss (\S+)", out)
    assert losses[-1] < losses[0] / 10
    assert "after 11 comes [22, 33, 44, 55, 66, 77, 88]" in out
