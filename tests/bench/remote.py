"""An object in a process of its own: what a side of a row uses, and nothing else beside it.

    python -m bench.remote

Pickled calls come on standard input, and pickled answers go to standard output. The first call
names the class, as `module:name`, and what it is made with.
"""

import importlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import programs
from bench.clocks import cpu_clock


class Remote:
    """Makes the object and calls its methods; a context manager that ends the process.

    Args:
        target: Its class, as `module:name`.
        arguments: What it is made with.
        env: Variables of the process, beside this one's; "" takes one away.
        python: Its interpreter; one of another environment needs a `PYTHONPATH` of its own.
    """

    def __init__(
        self,
        target: str,
        *arguments: Any,
        env: Mapping[str, str] | None = None,
        python: str = sys.executable,
    ) -> None:
        every = {**programs.variables(), **(env or {})}
        self._process = subprocess.Popen(
            [python, "-P", "-m", "bench.remote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={name: value for name, value in every.items() if value},
        )
        self.call(target, *arguments)
        self.cpu_clock: Callable[[], float] = cpu_clock([self._process.pid], own=False)

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method and wait for its answer.

        Raises:
            EOFError: It raised; standard error has what.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump((method, arguments), self._process.stdin)
        self._process.stdin.flush()
        return pickle.load(self._process.stdout)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> "Remote":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def main() -> None:
    """Be the process."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(value: object) -> None:
        pickle.dump(value, answers)
        answers.flush()

    target, arguments = pickle.load(sys.stdin.buffer)
    module, _, name = target.partition(":")
    made = getattr(importlib.import_module(module), name)(*arguments)
    answer(None)
    while True:
        try:
            method, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer(getattr(made, method)(*arguments))


if __name__ == "__main__":
    main()
