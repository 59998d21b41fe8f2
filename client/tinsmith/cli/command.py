"""What all commands that ask a cluster have in common: three options, and how they fail."""

import inspect
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from tinsmith.cli.access import Access
from tinsmith.cli.failures import BROKEN_PIPE, Failed, failure_of
from tinsmith.cli.output import Output
from tinsmith.cli.text import seconds_of
from tinsmith.errors import TinsmithError

TIMEOUT_S = 30.0
NEVER = "never"

Address = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="The Training server; else TINSMITH_ADDRESS, TINKER_BASE_URL, 127.0.0.1:50051.",
    ),
]
Timeout = Annotated[
    float, typer.Option(metavar="SECONDS", min=0.1, help="How long an answer may take.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, errors too.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask whether to go on.")]

Handler = Callable[..., None]


class Session:
    """One run of a command: where it writes, and the cluster that it asks.

    Attributes:
        out: Where it writes.
    """

    def __init__(self, address: str | None, timeout_s: float, as_json: bool) -> None:
        self.out = Output(as_json=as_json)
        self.address = address
        self.timeout_s = timeout_s
        self._access: Access | None = None

    @property
    def access(self) -> Access:
        """The cluster."""
        if self._access is None:
            self._access = Access(self.address, self.timeout_s)
        return self._access

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self._access is not None:
            self._access.close()
        if isinstance(error, TinsmithError):
            at = self._access.address if self._access is not None else ""
            failed = Failed("")
            failed.failure = failure_of(error, at)
            raise failed from error
        if isinstance(error, BrokenPipeError):
            silence()
            raise typer.Exit(BROKEN_PIPE) from error


def time_to_live(text: str) -> int | None:
    """Seconds of what a person typed; None for `NEVER`.

    Raises:
        typer.BadParameter: It is no time span.
    """
    if text == NEVER:
        return None
    try:
        return seconds_of(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def silence() -> None:
    """Let what is left in standard output go nowhere: nobody reads it any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def command(app: typer.Typer, name: str, *, asks: bool = True) -> Callable[[Handler], Handler]:
    """Make a function a command, with the options `--address`, `--timeout` and `--json` besides.

    Args:
        app: Of which group.
        name: What it is called.
        asks: Whether it asks a cluster; else it has `--json` alone.

    Returns:
        A decorator. The function takes a `Session` first; its docstring is the command's help.
    """
    common: tuple[tuple[str, Any, object], ...] = (("as_json", Json, False),)
    if asks:
        common = (("address", Address, None), ("timeout", Timeout, TIMEOUT_S), *common)

    def decorate(handler: Handler) -> Handler:
        def run(
            *, as_json: bool, address: str | None = None, timeout: float = TIMEOUT_S, **given: Any
        ) -> None:
            with Session(address, timeout, as_json) as session:
                handler(session, **given)

        own = list(inspect.signature(handler).parameters.values())[1:]
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [parameter.replace(kind=keyword) for parameter in own]
        parameters += [
            inspect.Parameter(key, keyword, default=default, annotation=kind)
            for key, kind, default in common
        ]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        run.__doc__ = handler.__doc__
        app.command(name)(run)
        return handler

    return decorate
