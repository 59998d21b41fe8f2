"""How much the fault tests do: enough for every change, or what `make faults` asks for."""

import os
from typing import TypeVar

T = TypeVar("T")

FULL = os.environ.get("TINSMITH_TEST_FAULTS", "") == "full"
SEED = int(os.environ.get("TINSMITH_TEST_SEED", "1"))


def amount(every_change: T, full: T) -> T:
    """One of the two."""
    return full if FULL else every_change
