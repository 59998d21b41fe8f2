"""docs/cli.md has each command as it is, and each exit status."""

import re

import pytest

import cli_screens
import commands
from tinsmith.cli import failures

DOCUMENT = commands.DOCUMENT.read_text()


def test_the_screens_of_help_are_what_the_commands_say() -> None:
    """`make screens` writes them, and the others."""
    assert cli_screens.drawn(DOCUMENT, None) == DOCUMENT, "run `make screens`"


@pytest.mark.parametrize("path", list(commands.paths()), ids=" ".join)
def test_each_command_has_its_help_there(path: tuple[str, ...]) -> None:
    assert f"<!-- screen: {' '.join(['tinsmith', *path, '--help'])} -->" in DOCUMENT


def test_each_screen_is_of_a_command() -> None:
    known = {" ".join(path) for path in commands.paths()}
    for marker, _, shown in commands.SCREEN.findall(DOCUMENT):
        words = marker.split()
        line = " ".join(words)
        assert words[0] == "tinsmith"
        assert {" ".join(words[1:2]), " ".join(words[1:3])} & known or words[1] == "--help"
        assert shown.startswith(f"$ {line}\n")


def test_each_exit_status_is_there() -> None:
    table = DOCUMENT[DOCUMENT.index("| Status") :].partition("\n\n")[0]
    statuses = [int(number) for number in re.findall(r"^\| ([0-9]+) ", table, re.MULTILINE)]
    named = [
        value for name, value in vars(failures).items() if name.isupper() and type(value) is int
    ]
    assert statuses == sorted(named)
