"""What `test_bench_sampling` has in another process: it imports nothing that takes long."""

import os


class Counter:
    """Something to have in another process."""

    def __init__(self, start: int) -> None:
        self._value = start

    def add(self, value: int) -> tuple[int, int]:
        """The sum so far, and the process that keeps it."""
        print("what libraries print is no answer")
        self._value += value
        return self._value, os.getpid()
