"""Logging to standard error that no caller can forge and no reader can hold up."""

import logging
import os
import select
import stat
import sys
from types import TracebackType

from tinsmithd.text import bounded

MESSAGE_BYTES_MAX = 4096
TRACE_LINES_MAX = 100
TRACE_LINE_BYTES_MAX = 500
WRITE_BYTES = 4096
"""Number of bytes that a pipe takes wholly or not at all (PIPE_BUF)."""

_TRACE_PREFIX = "  | "

ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class LineFormatter(logging.Formatter):
    """One line for each event; lines of a traceback are marked, so that none looks like an event.

    Events and tracebacks quote what callers sent: both are escaped and cut.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        record.message = bounded(record.message, MESSAGE_BYTES_MAX)
        return super().formatMessage(record)

    def formatException(self, ei: ExcInfo) -> str:
        """See `logging.Formatter`."""
        lines = super().formatException(ei).splitlines()
        if len(lines) > TRACE_LINES_MAX:
            half = TRACE_LINES_MAX // 2
            lines = [*lines[:half], f"... {len(lines) - 2 * half} lines ...", *lines[-half:]]
        return "\n".join(_TRACE_PREFIX + bounded(line, TRACE_LINE_BYTES_MAX) for line in lines)


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
            text = f"{self.format(record)}\n"
            if self._dropped_count:
                text = f"(no room in this log: {self._dropped_count} events were dropped)\n{text}"
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


def log_to_stderr(level: str, name: str) -> None:
    """Send all events of this process to standard error, one line each.

    Args:
        level: Events below it are left out.
        name: What the process is called there.
    """
    handler = StderrHandler()
    handler.setFormatter(
        LineFormatter(f"%(asctime)s {name} %(levelname)s %(message)s", datefmt="%H:%M:%S")
    )
    logging.basicConfig(level=level, handlers=[handler], force=True)
