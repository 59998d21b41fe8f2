"""The code of a release: this checkout, or that of a commit, which runs in the same environment."""

import os
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import programs
from tinsmithd.processes.template import client as template

ROOT = Path(__file__).parents[2]
FIRST = "a8cbe299212e5688127a5f2c478c133fca3bece8"
"""The last commit that wrote all files in the formats of the first release; `tests/data/0.1.0` is
of its servers."""
OLD = os.environ.get("TINSMITH_TEST_OLD", "") or FIRST
"""The release that is upgraded: a commit or a tag (`make upgrade OLD=v0.1.0`)."""
FOLDERS = ("client/tinsmith", "services/tinsmithd")


class NoSuchCommit(Exception):
    """This checkout does not have it; a clone may have been made without its history."""


@dataclass(frozen=True)
class Release:
    """Where its code is.

    Attributes:
        name: For people.
        code: A folder as the repository's root; None for this checkout.
    """

    name: str
    code: Path | None = None

    @property
    def forked(self) -> bool | None:
        """Whether its programs may be forked from the template of the tests, which is this code."""
        return None if self.code is None else False

    def variables(self, **more: str) -> Mapping[str, str]:
        """The environment of its programs."""
        found = programs.variables(**more)
        if self.code is not None:
            # What its servers start must be of this code too.
            found.pop(template.SOCKET_VARIABLE, None)
            folders = [self.code / "client", self.code / "services"]
            found["PYTHONPATH"] = os.pathsep.join(map(str, folders))
        return found


NEW = Release("new")


def archived(commit: str, folder: Path) -> Release:
    """The code of a commit.

    Args:
        commit: Anything that git takes for one.
        folder: Where its files go.

    Raises:
        NoSuchCommit: It is not here.
    """
    with tempfile.TemporaryFile() as archive:
        command = ["git", "-C", str(ROOT), "archive", "--format=tar", commit, *FOLDERS]
        done = subprocess.run(command, stdout=archive, stderr=subprocess.PIPE, check=False)
        if done.returncode:
            raise NoSuchCommit(done.stderr.decode().strip())
        archive.seek(0)
        with tarfile.open(fileobj=archive) as files:
            files.extractall(folder, filter="data")
    return Release(commit[:12], folder)
