"""All commands together, and what becomes of whatever they raise."""

import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.main import get_command

from tinsmith.cli import backups, checkpoints, doctor, keys, models, sample, status, top
from tinsmith.cli.command import Json, silence
from tinsmith.cli.failures import BROKEN_PIPE, DONE, INTERRUPTED, USAGE, WRONG, Failed, Failure
from tinsmith.cli.output import Output

TRACEBACK_VARIABLE = "TINSMITH_TRACEBACK"
"""Set to anything, it shows where an error came from."""
PASSED_ON = {
    "up": "Run a cluster on this machine; needs tinsmith[server].",
    "plan": "Say what a base model takes of GPUs, before it is loaded.",
    "config": "Print the settings in force; needs tinsmith[control].",
}
"""Commands that know their own arguments, and what they do."""
_HELP = """A training API for language models that you run yourself.

Commands that ask a cluster take --address, --timeout and --json; `up` starts one.
"""


def new_app(pass_on: Callable[[str, Sequence[str]], None], version: str) -> typer.Typer:
    """The command with all that is below it.

    Args:
        pass_on: Runs one of those that know their own arguments: `up`, `plan` and `config`.
        version: What `--version` and `version` print.
    """
    app = typer.Typer(
        name="tinsmith",
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
    )
    for name, about in PASSED_ON.items():
        _add_passed_on(app, name, about, pass_on)
    status.add_to(app)
    top.add_to(app)
    doctor.add_to(app)
    app.add_typer(models.app, name="models")
    app.add_typer(checkpoints.app, name="checkpoints")
    app.add_typer(keys.app, name="keys")
    app.add_typer(backups.app, name="backup")
    sample.add_to(app)

    _add_version(app, version)
    return app


def _add_version(app: typer.Typer, version: str) -> None:
    def show(as_json: Json = False) -> None:
        out = Output(as_json=as_json)
        out.json({"version": version}) if as_json else out.line(f"tinsmith {version}")

    def asked(value: bool) -> None:
        if value:
            show()
            raise typer.Exit

    option = typer.Option("--version", callback=asked, is_eager=True, help="Print the version.")

    def root(version: Annotated[bool, option] = False) -> None:
        """What comes before a command."""

    app.command("version", help="Print the version.")(show)
    app.callback(help=_HELP)(root)


def _add_passed_on(
    app: typer.Typer, name: str, about: str, pass_on: Callable[[str, Sequence[str]], None]
) -> None:
    settings: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}

    def run(context: typer.Context) -> None:
        pass_on(name, [name, *context.args])

    app.command(name, help=about, context_settings=settings, add_help_option=False)(run)


def run(app: typer.Typer, argv: Sequence[str]) -> int:
    """Run a command line; returns its exit status.

    Args:
        app: All commands.
        argv: The command line without the program's name.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may lack a letter
            stream.reconfigure(errors="backslashreplace")
    try:
        result = get_command(app).main(args=list(argv), prog_name="tinsmith", standalone_mode=False)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        silence()
        return BROKEN_PIPE
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        return _say(error, argv)
    return result if isinstance(result, int) else DONE


def _say(error: Exception, argv: Sequence[str]) -> int:
    failure = _failure(error)
    Output(as_json="--json" in argv).fail(failure)
    return failure.status


def _failure(error: Exception) -> Failure:
    if isinstance(error, Failed):
        return error.failure
    if isinstance(error, typer.TyperException):  # the command line is wrong
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "tinsmith"
        message = error.format_message().strip()
        return Failure(message, f"`{path} --help` says what there is", USAGE)
    if isinstance(error, typer.Abort):
        return Failure("nothing was done")
    if isinstance(error, ImportError):
        return Failure(str(error), "pip install 'tinsmith[client]'")
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return Failure(f"{where}{error.strerror or error}")
    hint = f"this is a fault of the program; with {TRACEBACK_VARIABLE}=1 it shows where"
    return Failure(f"{type(error).__name__}: {error}", hint, WRONG)
