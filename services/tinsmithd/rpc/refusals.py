"""Says in the log that calls were refused, now and then: who tries again and again fills none."""

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable

INTERVAL_S = 10.0

_log = logging.getLogger(__name__)


class Refusals:
    """Counts refused calls. Lives on one event loop.

    Args:
        what: What is refused, as the log says it.
        reasons: Why, as far as that is known before.

    Attributes:
        counts: How many were refused so far, by why.
    """

    def __init__(self, what: str, reasons: Iterable[str] = ()) -> None:
        self.counts: Counter[str] = Counter(dict.fromkeys(reasons, 0))
        self._what = what
        self._unsaid = 0
        self._said_s: float | None = None

    def refused(self, peer: str, why: str) -> None:
        """One call was refused.

        Args:
            peer: Who made it, as grpc calls it.
            why: For a person, one of a few; nothing that the caller wrote.
        """
        self.counts[why] += 1
        self._unsaid += 1
        now_s = asyncio.get_running_loop().time()
        if self._said_s is not None and now_s - self._said_s < INTERVAL_S:
            return
        _log.error("refused %d %s, the last from %s: %s", self._unsaid, self._what, peer, why)
        self._said_s, self._unsaid = now_s, 0
