"""Python's collector of cycles, out of the way of calls.

It stops all threads of a process, for a microsecond or so per object that it looks at. By itself it
looks whenever 700 objects more were made than freed, which a thousand calls under way are again and
again, none of them garbage: a few milliseconds forty times in five seconds, some tens of
milliseconds now and then. What calls leave behind for it is little, since nearly all that they use
is freed without it; so it looks when nothing is under way, and else when that little may have
become much.
"""

import asyncio
import gc
from collections.abc import Callable

YOUNG_MAX = 200_000
"""Objects more made than freed after which it looks whatever is under way; some 50 MB."""
INTERVAL_S = 1.0
"""How often somebody looks whether nothing is under way."""


async def collect_between_calls(is_idle: Callable[[], bool]) -> None:
    """Leave all objects of now alone for good, and collect later ones while nothing is under way.

    Args:
        is_idle: Whether nothing is.
    """
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(YOUNG_MAX, *before[1:])
    try:
        while True:
            await asyncio.sleep(INTERVAL_S)
            young, *older = gc.get_count()
            if is_idle() and (young > before[0] or any(older)):
                gc.collect()
    finally:
        gc.set_threshold(*before)
