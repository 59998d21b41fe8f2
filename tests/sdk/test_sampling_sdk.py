"""The stock SDK samples and looks after checkpoints through the gateway; `make sdk` installs it.

Each version is in an environment of its own: `build/sdk/VERSION`, or below `TINSMITH_SDK_VENVS`.
"""

import json
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from clusters import RunningCluster
from gateways import RunningGateway, running_gateway

ROOT = Path(__file__).parents[2]
VENVS = Path(os.environ.get("TINSMITH_SDK_VENVS", ROOT / "build" / "sdk"))
NEWEST, OLDER = "0.38.0", ("0.25.0", "0.22.7", "0.18.2")
PROGRAM_S_MAX = 240
pytestmark = pytest.mark.timeout(5 * PROGRAM_S_MAX)


def python_of(version: str) -> Path:
    """Python with one version of the SDK."""
    found = VENVS / version / "bin" / "python"
    if not found.exists():
        pytest.skip(f"no SDK {version} in {VENVS}: run `make sdk`")
    return found


def begun(version: str, file: str, program: str, url: str, **more: str) -> subprocess.Popen[str]:
    """A program on a version of the SDK."""
    settings = {"TINKER_BASE_URL": url, "TINKER_API_KEY": "tml-test", "TINKER_TELEMETRY": "0"}
    return subprocess.Popen(
        [python_of(version), "-W", "ignore", Path(__file__).with_name(file), program],
        env={"PATH": os.environ["PATH"], **settings, **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a program found."""
    try:
        out, err = process.communicate(timeout=PROGRAM_S_MAX)
    finally:
        process.kill()
    assert process.returncode == 0, err[-4000:]
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def ran(version: str, file: str, program: str, url: str, **more: str) -> dict[str, Any]:
    """Run a program whole."""
    return end_of(begun(version, file, program, url, **more))


@pytest.mark.parametrize("program", ["parameters", "prompts", "weights", "refusals"])
def test_every_version_samples_the_same(program: str, gateway: RunningGateway) -> None:
    """To the bit, since it is the same requests that they send."""
    found = []
    for version in (NEWEST, *OLDER):
        python_of(version)
        found.append(ran(version, "sampling_programs.py", program, gateway.url))
    for each in found:
        del each["version"]
        each.pop("said", None)
    assert all(each == found[0] for each in found)


@pytest.mark.parametrize("program", ["scores", "cancelled"])
def test_the_newest_samples_with_all_that_it_has(program: str, gateway: RunningGateway) -> None:
    """Scores of prompts, tables, cancelling."""
    ran(NEWEST, "sampling_programs.py", program, gateway.url)


@pytest.mark.parametrize("version", [NEWEST, *OLDER])
def test_every_version_looks_after_its_checkpoints(version: str, gateway: RunningGateway) -> None:
    """Lists, a life, marks, archives, deletion."""
    ran(version, "run_programs.py", "rest", gateway.url)


@pytest.mark.parametrize("program", ["newer", "cli"])
def test_the_newest_has_external_weights_and_a_command(
    program: str, gateway: RunningGateway
) -> None:
    """Exports, copies, searches; and what `tinker` does in a shell."""
    ran(NEWEST, "run_programs.py", program, gateway.url)


def test_a_gateway_is_killed_under_samples_and_none_is_lost(
    cluster: RunningCluster, tmp_path: Path
) -> None:
    """The user's script ends with the same tokens, and just takes longer."""
    with running_gateway(cluster.address, tmp_path) as gateway:
        undisturbed = ran(NEWEST, "sampling_programs.py", "slow", gateway.url)
        process = begun(NEWEST, "sampling_programs.py", "slow", gateway.url)
        assert process.stderr is not None
        assert process.stderr.readline().strip() == "begun"
        ended = threading.Event()

        def kill() -> None:
            for _ in range(3):
                if ended.wait(0.7):
                    return
                gateway.kill()
                gateway.start()

        killer = threading.Thread(target=kill)
        killer.start()
        found = end_of(process)
        ended.set()
        killer.join()
        assert found == undisturbed
