"""How much the attack suite does: enough for every change, or what `make attack N=...` asks for."""

import os

ATTACKS = int(os.environ.get("TINSMITH_TEST_ATTACKS", "0"))
"""What `N` says; 0 for the short form."""
SEED = int(os.environ.get("TINSMITH_TEST_SEED", "1"))


def amount(every_change: int, most: int = 1_000_000_000) -> int:
    """So many attempts of one kind: the short form's number, or N where it is given.

    Args:
        every_change: The short form's number.
        most: More than so many never make sense, such as connections of one process.
    """
    return min(ATTACKS, most) if ATTACKS else every_change
