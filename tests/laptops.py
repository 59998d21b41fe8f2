"""An installation of the client and some extras alone: nothing else can be imported there."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(*extras: str) -> Sequence[str]:
    """What the distribution needs with these extras, those that they name included."""
    found = list(PROJECT["dependencies"])
    for extra in extras:
        for each in PROJECT["optional-dependencies"][extra]:
            own = re.fullmatch(r"tinsmith\[([\w,]+)\]", each)
            found += requirements(*own[1].split(",")) if own else [each]
    return found


def needed(named: Iterable[str]) -> set[str]:
    """Distributions that requirements name, and those that they need in turn; without extras."""
    found: set[str] = set()
    left = list(named)
    while left:
        requirement, _, marker = left.pop().partition(";")
        name = re.match(r"[\w.-]+", requirement)
        if name is None or "extra ==" in marker or name[0] in found:
            continue
        try:
            left += importlib.metadata.requires(name[0]) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of another system, or an older Python
        found.add(name[0])
    return found


def site_packages(folder: Path, *extras: str) -> Path:
    """Make a folder what `pip install 'tinsmith[EXTRAS]'` would, but for tinsmith itself."""
    for name in needed(requirements(*extras)):
        for file in importlib.metadata.files(name) or []:
            link = folder / file.parts[0]
            if link.exists() or file.parts[0].startswith(".."):
                continue
            whole = Path(str(file.locate()))
            link.symlink_to(whole if len(file.parts) == 1 else whole.parents[len(file.parts) - 2])
    return folder


def run(
    folder: Path, *argv: str, variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command line where nothing is installed but what a folder has.

    Args:
        folder: As `site_packages` makes it.
        argv: The command line without the program's name.
        variables: All of its environment, but for where it imports from.
    """
    path = os.pathsep.join(map(str, (ROOT / "client", ROOT / "services", folder)))
    return subprocess.run(
        [sys.executable, "-S", "-m", "tinsmith.cli", *argv],
        env={"PATH": "", **(variables or {}), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
