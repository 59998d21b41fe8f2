"""Python's collector of cycles, out of the way of calls.

It stops all threads of a process, for a microsecond or so per object that it looks at. By itself it
looks at all that there is again and again while a thousand calls are under way, none of it garbage:
some tens of milliseconds now and then. Here it looks at new objects alone while calls are under
way, a few at a time, and what is left is put aside; at the rest when nothing is under way, and else
when so much was put aside that the little garbage in it may have become much. Nearly all that calls
use is freed without it: what makes a cycle with each call is a fault (`tests/unit/test_flow.py`).
"""

import asyncio
import gc
from collections.abc import Callable

YOUNG_MAX = 2_000
"""Objects more made than freed after which it looks at them: a millisecond. At 200,000, which two
thousand calls have under way, one look took 120 ms of processor time."""
OLDER_MAX = 400_000
"""Those that are put aside before it looks at them whatever is under way; some 100 MB."""
INTERVAL_S = 1.0
"""How often somebody looks whether nothing is under way."""


async def collect_between_calls(is_idle: Callable[[], bool]) -> None:
    """Leave all objects of now alone for good; look at later ones as this module says.

    Args:
        is_idle: Whether nothing is.
    """
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(YOUNG_MAX, OLDER_MAX // YOUNG_MAX, *before[2:])
    try:
        while True:
            await asyncio.sleep(INTERVAL_S)
            young, *older = gc.get_count()
            if is_idle() and (young > before[0] or any(older)):
                gc.collect()
    finally:
        gc.set_threshold(*before)
