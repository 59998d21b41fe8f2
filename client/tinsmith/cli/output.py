"""What a command shows: tables, records and progress for people, JSON for programs.

All text goes through `text.plain` here, and none of it is read as rich's markup: names, metadata
and errors are what somebody else wrote.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console, Group
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from tinsmith.cli.failures import USAGE, Failed, Failure
from tinsmith.cli.records import finite
from tinsmith.cli.text import plain, prose

Cell = str | int | tuple[str, str]
"""A text, a number, or a text with rich's name of a style."""
Row = Sequence[Cell]

COLUMNS_MAX = 10_000
"""Width of what is no terminal: nothing is cut or folded there."""
STYLES = {
    **dict.fromkeys(("ready", "serving", "ok"), "green"),
    **dict.fromkeys(("suspended", "skipped", "training", "sampler"), ""),
    **dict.fromkeys(("recovering", "loading", "warning"), "yellow"),
    **dict.fromkeys(("lost", "unreachable", "not serving", "wrong"), "bold red"),
}
"""Of the words that say how something is."""


def word(state: str) -> Cell:
    """A word that says how something is, in its colour."""
    return state, STYLES.get(state, "")


class Output:
    """Where one command writes. Standard output has results alone; the rest is standard error.

    Args:
        as_json: Results, and errors too, are JSON.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.console = _console(sys.stdout)
        self._errors = _console(sys.stderr)

    @property
    def is_seen(self) -> bool:
        """Whether a person looks at standard error, where progress is shown."""
        return self._errors.is_terminal and not self.as_json

    # --- results ------------------------------------------------------------------------------

    def json(self, document: Any) -> None:
        """Print a JSON document; characters beyond ASCII are escaped in it."""
        self._write(json.dumps(finite(document), indent=2, allow_nan=False) + "\n")

    def json_line(self, document: Any) -> None:
        """Print a JSON document as one line of several."""
        self._write(json.dumps(finite(document), allow_nan=False) + "\n")

    def line(self, text: str) -> None:
        """Print one line."""
        self._write(plain(text, COLUMNS_MAX) + "\n")

    def pieces(self, text: str) -> None:
        """Print a part of a text, which may have several lines, as it comes."""
        self._write(prose(text))

    def _write(self, text: str) -> None:
        # Not by rich, which would wrap it.
        sys.stdout.write(text)
        sys.stdout.flush()

    def table(self, columns: Sequence[str], rows: Sequence[Row]) -> None:
        """Print rows under the names of their columns; see `table_of`."""
        self.console.print(table_of(columns, rows))

    def pairs(self, rows: Sequence[tuple[str, Cell]]) -> None:
        """Print names with their values, one a line."""
        self.console.print(pairs_of(rows))

    # --- beside them --------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Tell a person something that is no result."""
        if not self.as_json:
            self._errors.print(Text(plain(text, COLUMNS_MAX)), style="dim")

    def fail(self, failure: Failure) -> None:
        """Say what went wrong."""
        if self.as_json:
            content = {"message": failure.message, "hint": failure.hint, "status": failure.status}
            content |= {"reason": failure.reason, "field": failure.field}
            document = {"error": content | {"request_id": failure.request_id}}
            sys.stderr.write(json.dumps(document) + "\n")
            return
        reason = f" ({failure.reason})" if failure.reason else ""
        message = Text(f"tinsmith: {plain(failure.message, 2000)}{plain(reason)}")
        message.stylize("bold red", 0, len("tinsmith:"))
        self._errors.print(message)
        if failure.hint:
            self._errors.print(Text(f"  hint: {plain(failure.hint, 2000)}"))

    def confirm(self, question: str, *, yes: bool) -> None:
        """Ask whether to go on, unless that was said already.

        Raises:
            Failed: The answer is no, or nobody can be asked.
        """
        if yes:
            return
        if self.as_json or not sys.stdin.isatty():
            raise Failed("nobody can be asked whether to go on", "--yes goes on", USAGE)
        self._errors.print(Text(f"{plain(question, 2000)} [y/N] "), end="")
        answer = sys.stdin.readline().strip().lower()
        if answer not in ("y", "yes"):
            raise Failed("nothing was done")

    @contextlib.contextmanager
    def progress(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Show how far something long is, with bytes and rate, where a person looks.

        Args:
            what: A word or two.

        Yields:
            A function that takes the bytes that are done, and those of all.
        """
        if not self.is_seen:
            yield lambda done, total: None
            return
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn())
        more = (TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, *more, console=self._errors, transient=True) as bar:
            task = bar.add_task(plain(what, 60), total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


def table_of(columns: Sequence[str], rows: Sequence[Row]) -> Table:
    """A table without lines; numbers are on the right, and what is too long for it is folded."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(columns):
        numbers = bool(rows) and all(isinstance(row[index], int) for row in rows)
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_cell, row))
    return table


def pairs_of(rows: Sequence[tuple[str, Cell]]) -> Table:
    """A table of names and values."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(plain(name), _cell(value))
    return table


def stacked(*parts: Any) -> Group:
    """Renderables one below the other, with an empty line between them."""
    found: list[Any] = []
    for part in parts:
        found += [Text(), part] if found else [part]
    return Group(*found)


def _cell(cell: Cell) -> Text:
    if isinstance(cell, int):
        return Text(f"{cell:,}")
    text, style = cell if isinstance(cell, tuple) else (cell, "")
    return Text(plain(text), style=style)


class _Console(Console):
    """rich's, but a reader that has gone is the command's to handle."""

    def on_broken_pipe(self) -> None:
        """Called while a BrokenPipeError is handled."""
        raise  # noqa: PLE0704


def _console(file: Any) -> Console:
    wanted = os.environ.get("COLUMNS", "")
    width = int(wanted) if wanted.isdecimal() and int(wanted) else COLUMNS_MAX
    at = None if file.isatty() else width
    return _Console(file=file, width=at, markup=False, highlight=False, emoji=False)
