"""`python -m sdk FOLDER` runs programs.py with every SDK under FOLDER, and prints a table.

All SDKs must compute the same. With `--kills N` one program runs N times while the gateway, the
Training server and the ranks are killed in turn, and must compute what it does undisturbed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clusters import RunningCluster
from gateways import RunningGateway, running_gateway
from tiny_models import write_tiny_model

PROGRAMS = Path(__file__).parent / "programs.py"
NAMES = ("sft", "pieces", "custom", "rl", "state", "errors", "sample", "rest")
PROGRAM_S_MAX = 300
KILL_EVERY_S = 1.5


def start(
    python: Path, gateway: RunningGateway, home: Path, *command: str | Path, **more: str
) -> subprocess.Popen[str]:
    """Start a program with an SDK, in the folder that is its home."""
    given = {
        "TINKER_BASE_URL": gateway.url,
        "TINKER_API_KEY": "tml-tests",
        "PYTHONWARNINGS": "ignore",
        "HOME": str(home),
        "PATH": os.environ["PATH"],
        "OMP_NUM_THREADS": "1",
        "SDK_TORCH": sysconfig.get_path("purelib"),  # the SDKs have none of their own
    }
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [python, *command], env=given | more, cwd=home, stdout=pipe, stderr=pipe, text=True
    )


def pythons_under(folder: Path) -> Mapping[str, Path]:
    """The interpreters of the SDKs under a folder, by their versions, the newest first.

    Raises:
        SystemExit: There is none.
    """
    found = sorted(folder.glob("*/bin/python"), reverse=True)
    if not found:
        sys.exit(f"no SDK under {folder}: run `make sdk`")
    return {path.parent.parent.name: path.absolute() for path in found}


def result_of(program: subprocess.Popen[str]) -> Mapping[str, Any]:
    """What a program printed.

    Raises:
        RuntimeError: It failed; the message is the end of what it said.
    """
    out, said = program.communicate(timeout=PROGRAM_S_MAX)
    if program.returncode:
        raise RuntimeError(said[-1500:])
    found: Mapping[str, Any] = json.loads(out.splitlines()[-1])
    return found


def matrix(
    pythons: Mapping[str, Path], names: Sequence[str], gateway: RunningGateway, home: Path
) -> int:
    """Run every program with every SDK; returns how many failed or computed something else."""
    failed = 0
    print("| program |", " | ".join(pythons), "|")
    for name in names:
        cells, first = [], None
        for version, python in pythons.items():
            begun_s = time.monotonic()
            try:
                result = result_of(start(python, gateway, home, PROGRAMS, name))
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                print(f"{name} with {version}:\n{error}", file=sys.stderr)
                cells.append("FAILED")
                failed += 1
                continue
            found = {k: v for k, v in result["found"].items() if k != "texts"}
            first = found if first is None else first
            same = found == first
            failed += not same
            cells.append(f"{time.monotonic() - begun_s:.1f} s" if same else "OTHER NUMBERS")
        print(f"| {name} |", " | ".join(cells), "|", flush=True)
    return failed


def kills(
    python: Path, rounds: int, gateway: RunningGateway, cluster: RunningCluster, home: Path
) -> int:
    """Kill processes while a program runs; returns how often it computed something else."""
    steps = {"SDK_STEPS": "12", "SDK_PAUSE": "1"}
    undisturbed = result_of(start(python, gateway, home, PROGRAMS, "sft", **steps))["found"]
    wrong = killed = 0
    for number in range(rounds):
        program = start(python, gateway, home, PROGRAMS, "sft", **steps)
        for step in range(3):
            time.sleep(KILL_EVERY_S)
            if program.poll() is not None:
                break
            victim = (number + step) % 3
            if victim == 0:
                gateway.kill()
                gateway.start()
            elif victim == 1:
                os.kill(cluster.pid("training"), signal.SIGKILL)
            else:
                for pid in cluster.rank_pids():
                    os.kill(pid, signal.SIGKILL)
            killed += 1
        try:
            found = result_of(program)["found"]
        except RuntimeError as error:
            print(f"round {number}:\n{error}", file=sys.stderr)
            found = None
        wrong += found != undisturbed
        print(f"round {number}: {'same bits' if found == undisturbed else found}", flush=True)
    print(f"{killed} kills in {rounds} rounds, {wrong} with other numbers")
    return wrong


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=NAMES)
    given = parser.parse_args()
    pythons = pythons_under(given.folder)
    with tempfile.TemporaryDirectory() as text:
        home = Path(text)
        base = write_tiny_model(home / "tiny-llama")
        with (
            RunningCluster(base, home / "cluster", keep=True) as cluster,
            running_gateway(cluster.address, home / "gateway") as gateway,
        ):
            if given.kills:
                first = next(iter(pythons.values()))
                sys.exit(kills(first, given.kills, gateway, cluster, home))
            sys.exit(matrix(pythons, given.only, gateway, home))


if __name__ == "__main__":
    main()
