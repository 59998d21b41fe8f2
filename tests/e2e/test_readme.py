"""What README.md tells people to type works as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

from clusters import RunningCluster

README = (Path(__file__).parents[2] / "README.md").read_text()


def block(after: str, language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README[README.index(after) :], re.DOTALL)
    assert found is not None
    return found[1]


def test_the_shell_recipes(cluster: RunningCluster) -> None:
    """List, create, forward_backward with typed numbers, step, save, sample, and a mistake."""
    script = block("The test of this file runs the next block", "sh")
    for name, port in (("training", "50051"), ("sampler", "50052")):
        assert f"127.0.0.1:{port}" in script
        script = script.replace(f"127.0.0.1:{port}", cluster.addresses[name])
    folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in (
        "tinsmith.v1.TrainingService\n",
        "tinsmith.v1.TrainingService/ForwardBackward",
        '"engine": "ENGINE_DEEPSPEED"',
        '"loss:sum"',
        '"grad_norm:last"',
        "/sampler_weights/first",
        "STOP_REASON_LENGTH",
        "exit status 24",
    ):
        assert expected in done.stdout, expected
    assert r"data[0].loss_fn_inputs[\"weights\"]: shape [1], expected [3]" in done.stderr


def test_the_first_script(cluster: RunningCluster) -> None:
    """The loop at the top runs, and its loss falls."""
    script = block("of the API is that of", "python")
    script = script.replace("127.0.0.1:50051", cluster.address)
    script = script.replace("SmolLM2-135M-Instruct", cluster.base_model)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    losses = [float(line) for line in done.stdout.splitlines()[:10]]
    assert losses[-1] < losses[0]
