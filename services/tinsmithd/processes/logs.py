"""Logging to standard error that no caller can forge and no reader can hold up."""

import logging
import os
import select
import stat
import sys
import threading
import traceback
from types import TracebackType
from typing import Any, Literal

from tinsmithd.processes.json_lines import JsonFormatter, fields_of
from tinsmithd.processes.messages import chain, error_text, message_of
from tinsmithd.text import bounded

MESSAGE_BYTES_MAX = 4096
TRACE_LINES_MAX = 100
TRACE_LINE_BYTES_MAX = 500
WRITE_BYTES = 4096
"""Number of bytes that a pipe takes wholly or not at all (PIPE_BUF)."""

_TRACE_PREFIX = "  | "

_log = logging.getLogger(__name__)

ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class LineFormatter(logging.Formatter):
    """One line for each event; lines of a traceback are marked, so that none looks like an event.

    Both are escaped and cut, and say nothing that callers sent (`messages`).
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        said = "".join(f", {name} {value}" for name, value in fields_of(record).items())
        record.message = bounded(message_of(record) + said, MESSAGE_BYTES_MAX)
        return super().formatMessage(record)

    def formatException(self, ei: ExcInfo) -> str:
        """See `logging.Formatter`."""
        lines = _traceback_lines(ei[1])
        if len(lines) > TRACE_LINES_MAX:
            half = TRACE_LINES_MAX // 2
            lines = [*lines[:half], f"... {len(lines) - 2 * half} lines ...", *lines[-half:]]
        return "\n".join(_TRACE_PREFIX + bounded(line, TRACE_LINE_BYTES_MAX) for line in lines)


def _traceback_lines(error: BaseException | None) -> list[str]:
    lines: list[str] = []
    for each in chain(error):
        if lines:
            lines.append("Of that came:")
        lines.append("Traceback (most recent call last):")
        lines += "".join(traceback.format_tb(each.__traceback__)).splitlines()
        lines.append(f"{type(each).__qualname__}: {error_text(each)}")
    return lines


class StderrWriter:
    """Writes to standard error as long as that cannot block."""

    def __init__(self) -> None:
        self._fd, self._is_ours = _opened_anew(sys.stderr.fileno())
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLOUT)

    def write(self, data: bytes) -> bool:
        """Write; returns False when there was no room for any of it. What has begun may be cut."""
        begun = False
        for start in range(0, len(data), WRITE_BYTES):
            piece = data[start : start + WRITE_BYTES]
            while piece:
                if not self._poll.poll(0):
                    return begun
                try:
                    piece = piece[os.write(self._fd, piece) :]
                except BlockingIOError:
                    return begun
                begun = True
        return True

    def write_line(self, line: bytes) -> None:
        """Write a line, or drop it."""
        self.write(line + b"\n")

    def close(self) -> None:
        """Close the descriptor, if it is this writer's own."""
        if self._is_ours:
            self._is_ours = False
            os.close(self._fd)


class StderrHandler(logging.Handler):
    """Logs to standard error, and drops what cannot be written at once.

    A server writes its log on its event loop. With a pipe that nobody empties, an ordinary handler
    would stop the server at the pipe's 64 KiB.
    """

    def __init__(self) -> None:
        super().__init__()
        self._writer = StderrWriter()
        self._dropped_count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write one event, after a word on those that were dropped before it."""
        try:
            count, first = self._dropped_count, ""
            if count and isinstance(self.formatter, JsonFormatter):
                record.fields = {**fields_of(record), "dropped_events": count}
            elif count:
                first = f"(no room in this log: {count} events were dropped)\n"
            text = f"{first}{self.format(record)}\n"
            self._dropped_count = (
                0 if self._writer.write(text.encode()) else self._dropped_count + 1
            )
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        """Close what it writes to."""
        self._writer.close()
        super().close()


def _opened_anew(fd: int) -> tuple[int, bool]:
    """A descriptor that never blocks on the pipe behind `fd`, and whether it is a new one.

    Another process may fill the pipe between the question whether there is room and the write. The
    flag against that belongs to all processes that share the open file, so it needs one of its own.
    """
    if stat.S_ISFIFO(os.fstat(fd).st_mode):
        try:
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC), True
        except OSError:  # no /proc
            pass
    return fd, False


def log_to_stderr(level: str, name: str, form: Literal["text", "json"] = "text") -> None:
    """Send all events of this process to standard error, one line each.

    What ends the process or a thread of it is an event, too, and so are Python's warnings in JSON.

    Args:
        level: Events below it are left out.
        name: What the process is called there.
        form: How they are written.
    """
    handler = StderrHandler()
    if form == "json":
        handler.setFormatter(JsonFormatter(name))
        logging.captureWarnings(True)
    else:
        handler.setFormatter(
            LineFormatter(f"%(asctime)s {name} %(levelname)s %(message)s", datefmt="%H:%M:%S")
        )
    logging.basicConfig(level=level, handlers=[handler], force=True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread


def is_json() -> bool:
    """Whether this process logs JSON."""
    return any(isinstance(each.formatter, JsonFormatter) for each in logging.root.handlers)


def _log_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    else:
        _log.critical("this process ends by an error", exc_info=(kind, error, trace))


def _log_uncaught_in_thread(found: Any) -> None:
    error = found.exc_value
    if error is not None and not isinstance(error, SystemExit):
        name = found.thread.name if found.thread is not None else "unknown"
        _log.critical("thread %s ends by an error", name, exc_info=error)
