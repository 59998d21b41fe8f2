"""What is handed to a log is what may stand in it: nothing that a caller wrote.

Errors and paths are handed over as they are, and `processes/messages.py` says what of them is
shown. Here are the ways around that.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tidy.house import Source, below

LEVELS = {"debug", "info", "warning", "error", "exception", "critical", "log"}
NAMES = ("model_id", "model_ids", "prompt", "user_metadata")
"""What callers choose or write, by what it is called here."""


def around(source: Source) -> Iterator[str]:
    """Calls of a module's log that hand over text which a caller may have written."""
    for node in ast.walk(source.tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner = node.func.value
        if not (isinstance(owner, ast.Name) and owner.id == "_log" and node.func.attr in LEVELS):
            continue
        for argument in node.args:
            if isinstance(argument, ast.JoinedStr):
                yield f"{source.path}:{node.lineno}: an f-string; hand its parts over"
            if isinstance(argument, ast.Attribute):
                of_error = ast.unparse(argument) == "error.message"
                if of_error or argument.attr in NAMES:
                    said = ast.unparse(argument)
                    yield f"{source.path}:{node.lineno}: {said}; see processes/messages.py"


def test_no_log_is_handed_what_a_caller_wrote() -> None:
    servers = below("services")
    assert servers
    assert [found for source in servers for found in around(source)] == []


@pytest.mark.parametrize(
    "line",
    [
        '_log.error("%s", error.message)',
        '_log.info(f"model {x}")',
        '_log.warning("model %s", self._model.model_id)',
    ],
)
def test_a_way_around_is_found(line: str) -> None:
    assert len(list(around(Source.of(Path("services/x.py"), line)))) == 1
    assert not list(around(Source.of(Path("services/x.py"), '_log.error("%s", error)')))
