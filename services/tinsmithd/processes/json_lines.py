"""Log lines as JSON: one object a line, which a pipe takes wholly or not at all."""

import json
import logging
import os
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from tinsmithd import tracing
from tinsmithd.processes.messages import chain, error_text, message_of

LINE_BYTES_MAX = 4096
"""With its end: what a pipe takes wholly or not at all (PIPE_BUF)."""
TEXT_BYTES_MAX = 1500
"""Maximum bytes of a message, or of what an error says, as they stand in the line."""
FRAMES_MAX = 30
_CUT = "... [cut]"


class JsonFormatter(logging.Formatter):
    """One JSON object for each event.

    Its keys: `time` (RFC 3339, UTC), `level`, `process`, `logger`, `message`; while a call is being
    served those of `tracing.logged`; with an error `error_type`, `error` and `traceback`, a list of
    frames, the innermost last; and what the event brings itself (`fields`).

    Args:
        process: What kind of process this is.
    """

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        event: dict[str, Any] = {
            "time": _time(record.created),
            "level": record.levelname,
            "process": self._process,
            "logger": record.name,
            "message": _cut(message_of(record)),
            **tracing.logged(),
            **fields_of(record),
        }
        error = record.exc_info[1] if record.exc_info else None
        frames: list[str] = []
        if error is not None:
            event["error_type"] = type(error).__qualname__
            event["error"] = _cut(error_text(error))
            frames = _frames(error)
        return _fitting(event, frames)


def fields_of(record: logging.LogRecord) -> Mapping[str, Any]:
    """What an event says besides its message."""
    found: Mapping[str, Any] = getattr(record, "fields", {})
    return found


def _time(created_s: float) -> str:
    when = datetime.fromtimestamp(created_s, UTC)
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _cut(text: str) -> str:
    """A text that takes at most `TEXT_BYTES_MAX` in a line: JSON writes most characters longer."""
    if len(_dumped(text)) <= TEXT_BYTES_MAX:
        return text
    least, most = 0, min(len(text), TEXT_BYTES_MAX)
    while least < most:
        middle = (least + most + 1) // 2
        if len(_dumped(text[:middle])) + len(_CUT) <= TEXT_BYTES_MAX:
            least = middle
        else:
            most = middle - 1
    return text[:least] + _CUT


def _frames(error: BaseException) -> list[str]:
    """Where an error came from, after where those came from that it came of."""
    found: list[str] = []
    for each in chain(error):
        if each is not error:
            found.append(f"{type(each).__qualname__}, and of that came")
        for frame in traceback.extract_tb(each.__traceback__):
            found.append(f"{_file(frame.filename)}:{frame.lineno} {frame.name}")
    return found


def _file(name: str) -> str:
    """A file's name from the package on."""
    for root in ("site-packages", "services", "client", "lib"):
        _, found, rest = name.rpartition(f"{os.sep}{root}{os.sep}")
        if found:
            return rest
    return name


def _fitting(event: dict[str, Any], frames: list[str]) -> str:
    """The line: of the frames those in the middle go first, where there is no room."""
    kept = frames if len(frames) <= FRAMES_MAX else [*frames[: FRAMES_MAX // 2], *frames[-15:]]
    dropped = len(frames) - len(kept)
    while True:
        if frames:
            half = (len(kept) + 1) // 2
            gap = [f"... {dropped} frames ..."] if dropped else []
            event["traceback"] = [*kept[:half], *gap, *kept[half:]]
        line = _dumped(event)
        if len(line) < LINE_BYTES_MAX or not kept:
            return line
        del kept[(len(kept) - 1) // 2]
        dropped += 1


def _dumped(value: object) -> str:
    # In ASCII, so that a character is a byte, and no line ends within one.
    return json.dumps(value, default=str)
