"""The `tinsmith` command. It comes with the client; what it runs may need more than that."""

import argparse
import importlib.metadata
import re
import sys
from collections.abc import Sequence

EXTRAS = {"up": "server", "config": "control", "plan": ""}
"""What a command needs beside the client, or nothing. These commands know their own arguments."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; without the servers it says what is missing and how to get it."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given and given[0] in EXTRAS:
        _run(given[0], given)
        return
    parser = argparse.ArgumentParser(prog="tinsmith", description="A training API that you run.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("up", help="run a cluster on this machine; `tinsmith up --help` says how")
    commands.add_parser(
        "config", help="print the settings of the servers, and where they come from"
    )
    commands.add_parser("plan", help="say what a base model takes of GPUs, before it is loaded")
    commands.add_parser("version", help="print the version")
    parser.parse_args(given)
    print(f"tinsmith {_version()}")


def _run(command: str, argv: Sequence[str]) -> None:
    missing = missing_for(EXTRAS[command]) if EXTRAS[command] else []
    if missing:
        sys.exit(_how_to_get(command, ", ".join(missing)))
    try:
        if command == "up":
            from tinsmithd.up import main as up

            up(argv)
        elif command == "plan":
            from tinsmithd.sizes.command import main as plan

            plan(argv[1:])
        else:
            from tinsmithd.config.command import main as config

            config(argv[1:])
    except ModuleNotFoundError as error:
        sys.exit(_how_to_get(command, str(error.name)))


def _how_to_get(command: str, what: str) -> str:
    how = f"pip install 'tinsmith[{EXTRAS[command]}]'"
    return f"tinsmith: `{command}` needs the servers, and {what} is not installed: {how}"


def missing_for(extra: str) -> list[str]:
    """Distributions of an extra, and of those that it names, that are not installed.

    Empty where this package is no installed distribution, which says what its extras are.
    """
    try:
        requirements = importlib.metadata.requires("tinsmith") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found: list[str] = []
    for requirement in requirements:
        named, _, marker = requirement.partition(";")
        if not re.search(rf"extra == ['\"]{extra}['\"]", marker):
            continue
        name, inner = re.fullmatch(r"\s*([\w.-]+)(?:\[([\w,.-]+)\])?.*", named).groups()  # type: ignore[union-attr]
        if name == "tinsmith":
            found += [lost for each in inner.split(",") for lost in missing_for(each.strip())]
        elif not _is_installed(name):
            found.append(name)
    return found


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _version() -> str:
    from tinsmith import __version__

    return __version__
