"""The `tinsmith` command. It comes with the client; what it runs may need more than that.

typer and rich are imported when a command runs, and by nothing else of the client.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

from tinsmith.cli.extras import missing_for

EXTRAS = {"up": "server", "config": "control", "plan": ""}
"""What a command needs beside the client, or nothing. These commands know their own arguments."""
_COMPLETING = "_TINSMITH_COMPLETE"
"""Set by a shell that asks what a line could go on with; the line is in the environment, too."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; without the servers it says what is missing and how to get it."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given and given[0] in EXTRAS:
        _run(given[0], given)
        return
    try:
        from tinsmith.cli import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("tinsmith"):
            raise
        sys.exit(f"tinsmith: {error.name} is not installed: pip install tinsmith brings it")
    if not given and _COMPLETING not in os.environ:
        app.run(commands(), ["--help"])
        sys.exit(2)
    sys.exit(app.run(commands(), given))


def commands() -> Any:
    """All commands, a `typer.Typer`. Imports typer, rich and what they run."""
    from tinsmith import __version__
    from tinsmith.cli import app

    return app.new_app(_run, __version__)


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
