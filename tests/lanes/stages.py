"""What `make test` runs, in which order, and how long each folder of tests may take."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TESTS_FOLDER = Path(__file__).parents[1]
OUT = Path("build") / "lanes"
"""Logs and timings of the last run."""


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: For people, and of its files in `OUT`.
        command: What runs, from the root of the repository.
    """

    name: str
    command: Sequence[str]

    @property
    def log(self) -> Path:
        """What it says."""
        return OUT / f"{self.name}.log"

    @property
    def timings(self) -> Path:
        """How long each test took, as JUnit has it; only where it runs tests."""
        return OUT / f"{self.name}.xml"


def _make(target: str) -> Stage:
    return Stage(target, (os.environ.get("MAKE", "make"), "--no-print-directory", target))


def _pytest(folder: str) -> Stage:
    command = (sys.executable, "-m", "pytest", f"tests/{folder}", f"--junitxml={OUT / folder}.xml")
    return Stage(folder, command)


QUEUE: Sequence[Stage] = (
    _make("lint"),
    _pytest("tidy"),
    _pytest("faults"),
    _pytest("conformance"),
    _pytest("e2e"),
    _pytest("unit"),
    _pytest("service"),
    _pytest("attack"),
    _pytest("sim"),
)
"""In this order: what says soonest that something is wrong, then the longest, so that the lanes end
together. The processes of `faults` and `e2e` are many, `conformance` and `unit` have one core."""

BUDGETS_S: Mapping[str, float] = {
    "tidy": 20,
    "unit": 120,
    "conformance": 240,
    "sim": 30,
    "service": 150,
    "e2e": 320,
    "faults": 360,
    "attack": 150,
}
"""Seconds that the tests of a folder may take together, on two cores. Nothing fails for more."""
