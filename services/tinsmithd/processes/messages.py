"""What of an event may stand in a log: nothing that a caller wrote.

Errors and paths say by `for_log` what of them may; of the text of any other error what stands in
quotes is left out while a call is being served, since that is where values are quoted.
"""

import logging
from collections.abc import Mapping
from typing import Any

from tinsmithd import tracing
from tinsmithd.text import without_quoted


def message_of(record: logging.LogRecord) -> str:
    """The message of an event."""
    text, args = str(record.msg), record.args
    if isinstance(args, Mapping):
        return text % {key: _loggable(value) for key, value in args.items()} if args else text
    return text % tuple(map(_loggable, args)) if args else text


def error_text(error: BaseException) -> str:
    """What an error says, as far as that may stand in a log."""
    for_log = getattr(error, "for_log", None)
    if for_log is not None:
        return str(for_log())
    reason = getattr(error, "reason", "")
    if reason and hasattr(error, "retry_after_s"):  # another server's, as the gateway has it
        return str(reason)
    text = str(error)
    return text if tracing.here() is None else without_quoted(text)


def chain(error: BaseException | None) -> list[BaseException]:
    """An error after those that it came of, and a group of them after its parts."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    whole: list[BaseException] = []
    for each in reversed(found):
        if isinstance(each, BaseExceptionGroup):
            for part in each.exceptions:
                whole += chain(part)
        whole.append(each)
    return whole


def _loggable(value: Any) -> Any:
    if isinstance(value, BaseException):
        return error_text(value)
    for_log = getattr(value, "for_log", None)
    return value if for_log is None else for_log()
