"""Runs `tinsmith` command lines in this process, which saves the start of an interpreter."""

import contextlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.main import get_command

import programs
from tinsmith import cli

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "cli.md"
WIDTH = "100"
"""Columns of the screens in the document."""
SCREEN = re.compile(r"(?<=<!-- screen: )(.*?)( -->\n+```console\n)(.*?)(?=```\n)", re.DOTALL)
"""In the document: a command line, what stands between it and its screen, the screen."""


@dataclass(frozen=True)
class Done:
    """What a command line did: its exit status, and what it wrote."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it wrote, as JSON."""
        return json.loads(self.out)


def tinsmith(*argv: str, both: io.StringIO | None = None, **variables: str) -> Done:
    """Run a command line to its end.

    Args:
        argv: The command line without the program's name.
        both: Takes standard output and standard error, in their order, as a terminal does.
        variables: Of the environment.
    """
    out, err = (io.StringIO(), io.StringIO()) if both is None else (both, both)
    status = 0
    with (
        programs.environment(**variables),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main(argv)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
            if isinstance(end.code, str):
                err.write(end.code + "\n")
    return Done(status, out.getvalue(), err.getvalue())


def paths() -> Iterator[Sequence[str]]:
    """Every command, as the words that it is called by; the first has none."""
    yield from _below(get_command(cli.commands()), ())


def _below(command: Any, path: Sequence[str]) -> Iterator[Sequence[str]]:
    yield path
    for name, each in getattr(command, "commands", {}).items():
        yield from _below(each, (*path, name))


def help_of(path: Sequence[str]) -> str:
    """What a command says of itself."""
    return shown([*path, "--help"])


def shown(argv: Sequence[str], **variables: str) -> str:
    """What a terminal shows of a command line's run, without colours."""
    both = io.StringIO()
    done = tinsmith(*argv, both=both, COLUMNS=WIDTH, NO_COLOR="1", **variables)
    lines = [line.rstrip() for line in both.getvalue().splitlines()]
    if done.status:
        lines += ["$ echo $?", str(done.status)]
    return "\n".join(lines).strip("\n") + "\n"
