"""Paths of checkpoints as the SDK writes them, and as the Checkpoint server has them.

    tinker://<run>/weights/<name>             tinsmith://<run>/weights/<name>
    tinker://<run>/sampler_weights/<name>     tinsmith://<run>/sampler_weights/<name>
    tinker://<run>/external_weights/<name>    tinsmith://<run>/sampler_weights/external.<name>

Both schemes are taken. External weights are what a Sampler's are: a folder for PEFT or for
transformers; only their name tells them apart.
"""

import re

from tinsmith.checkpoints import EXTERNAL_PREFIX
from tinsmithd.gateway.problems import Problem

KINDS = ("weights", "sampler_weights", "external_weights")
_PATH = re.compile(r"(?:tinker|tinsmith)://([^/\s]{1,200})/([a-z_]{1,20})/([^/\s]{1,200})")


def stored(path: str, field: str) -> str:
    """A path of a request, as the Checkpoint server has it.

    Raises:
        Problem: 400, it is none.
    """
    found = _PATH.fullmatch(path)
    if found is None or found[2] not in KINDS:
        form = "expected tinker://<run>/<weights|sampler_weights|external_weights>/<name>"
        raise Problem(400, f"{field}: {form}", "INVALID_NAME", field)
    return stored_of(found[1], found[2], found[3])


def stored_of(run: str, kind: str, name: str) -> str:
    """Where the Checkpoint server has what a run calls so.

    Args:
        run: The training run.
        kind: One of `KINDS`.
        name: The checkpoint's name.
    """
    if kind == "external_weights":
        kind, name = "sampler_weights", f"{EXTERNAL_PREFIX}{name}"
    return f"tinsmith://{run}/{kind}/{name}"


def split(path: str) -> tuple[str, str, str]:
    """Run, kind and name of a path of the Checkpoint server's, in the SDK's words."""
    run, kind, name = split_stored(path)
    if kind == "sampler_weights" and name.startswith(EXTERNAL_PREFIX):
        return run, "external_weights", name.removeprefix(EXTERNAL_PREFIX)
    return run, kind, name


def split_stored(path: str) -> tuple[str, str, str]:
    """Run, kind and name of a path of the Checkpoint server's, in its own words."""
    run, kind, name = path.removeprefix("tinsmith://").split("/", 2)
    return run, kind, name


def shown(path: str) -> str:
    """A path of the Checkpoint server's, as the SDK reads it."""
    return "tinker://" + "/".join(split(path))
