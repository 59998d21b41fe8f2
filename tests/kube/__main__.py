"""`make kube`: a cluster, its images, all tests on it, and its end, each with the time it took.

The Makefile says with what, in variables: KUBE_UP and KUBE_DOWN start and end a cluster (without
KUBE_UP there is one already), KUBE_LOAD takes the name of an image to its nodes (without it they
have them), KUBE_IMAGES are their names, TINSMITH_TEST_KUBECONFIG the file that leads to it.
Arguments are pytest's; without any, all tests are run.
"""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = (*sorted(map(str, ROOT.glob("tests/service/test_deploy*.py"))), str(ROOT / "tests/kube"))


class Stages:
    """Runs one command after the other; says what each took."""

    def __init__(self) -> None:
        self.took: list[tuple[str, float]] = []

    def run(self, name: str, command: Sequence[str]) -> bool:
        """Run a command; whether it succeeded."""
        print(f"--- {name}: {shlex.join(command)}", flush=True)
        begun_s = time.monotonic()
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        said = f"{name}: FAILED with {status}" if status else name
        self.took.append((said, time.monotonic() - begun_s))
        return status == 0


def main(arguments: Sequence[str]) -> int:
    """Run everything; returns the exit status."""
    up, down, load = (shlex.split(os.environ.get(f"KUBE_{n}", "")) for n in ("UP", "DOWN", "LOAD"))
    kubeconfig = os.environ.get("TINSMITH_TEST_KUBECONFIG", "")
    stages = Stages()
    good = not load or stages.run("images", [os.environ.get("MAKE", "make"), "images"])
    started = False
    try:
        if good and up:
            good = started = stages.run("cluster", up)
        if good and not os.access(kubeconfig, os.R_OK):
            print(f"TINSMITH_TEST_KUBECONFIG must name a kubeconfig file, is {kubeconfig!r}")
            good = False
        for image in os.environ["KUBE_IMAGES"].split() if load else ():
            good = good and stages.run(f"load {image}", [*load, image])
        if good:
            pytest = [sys.executable, "-m", "pytest", "-s", "-vv", "--durations=0"]
            good = stages.run("tests", [*pytest, *(arguments or TESTS)])
    finally:
        if started and down:
            stages.run("end", down)
    for name, seconds in stages.took:
        print(f"{seconds:8.0f} s  {name}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
