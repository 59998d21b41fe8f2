"""A program outside of a cluster that says line by line what it does, until it is told to end."""

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

WAIT_S_MAX = 900.0

Lines = list[dict[str, Any]]


class Program:
    """A Python script that prints a JSON object per line; a context manager that ends it.

    Args:
        name: In what is said when it fails.
        script: Its file.
        arguments: Of its command line.
        environment: All of it.

    Attributes:
        lines: What it has said.
    """

    def __init__(
        self, name: str, script: Path, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        self._name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed with the rest
        self._process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        self.lines: Lines = []
        self._came = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._came:
                self.lines.append(json.loads(line))
                self._came.notify_all()
        with self._came:
            self._ended = True
            self._came.notify_all()

    def until(self, true: Callable[[Lines], object]) -> None:
        """Wait until what it has said is enough.

        Raises:
            RuntimeError: It ended before, or says nothing more.
        """
        with self._came:
            if not self._came.wait_for(lambda: self._ended or true(self.lines), WAIT_S_MAX):
                raise RuntimeError(self._failure(f"waits since {WAIT_S_MAX:.0f} s"))
            if not true(self.lines):
                raise RuntimeError(self._failure(f"ended with {self._process.wait()}"))

    def tell(self) -> None:
        """Tell it that it is enough: its standard input ends."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def end(self) -> Lines:
        """Wait for its end; what it has said.

        Raises:
            RuntimeError: It failed, or does not end.
        """
        try:
            status = self._process.wait(WAIT_S_MAX)
        except subprocess.TimeoutExpired:
            raise RuntimeError(self._failure(f"goes on since {WAIT_S_MAX:.0f} s")) from None
        self._thread.join()
        if status:
            raise RuntimeError(self._failure(f"ended with {status}"))
        return self.lines

    def _failure(self, what: str) -> str:
        """What it did, the last that it said, and what it wrote to standard error."""
        self._errors.seek(0)
        last = map(str, self.lines[-3:])
        begin = f"{self._name} {what} after {len(self.lines)} lines:"
        return "\n".join((begin, *last, self._errors.read()[-4000:]))

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # of no effect on one that has ended
        self._process.wait()
        self._thread.join()
        self._errors.close()
