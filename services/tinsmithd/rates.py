"""What tenants may use in a minute: refused before it is used, and given back where it was not."""

import time
from collections.abc import Callable

from tinsmithd.errors import over_limit, quota_exceeded

WINDOW_S = 60.0
TENANTS_MAX = 10_000
"""Tenants that are remembered; those that used nothing lately are forgotten first."""


class Rates:
    """Counts what each tenant used, as a bucket that leaks: a minute's worth may come at once.

    Args:
        limit: Name of the limit.
        clock: A clock that nobody sets, seconds.
    """

    def __init__(self, limit: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        self._used: dict[str, tuple[float, float]] = {}
        """What a tenant's bucket holds, and since when."""

    def take(self, tenant: str, amount: int, most: int, field: str) -> None:
        """Use some.

        Args:
            tenant: Who.
            amount: How much.
            most: How much may be used in a minute; 0: any amount.
            field: The field of the request that is as much.

        Raises:
            InvalidArgument: It is more than may ever be used at once (LIMIT_EXCEEDED).
            ResourceExhausted: It is too much now (QUOTA_EXCEEDED).
        """
        if not most:
            return
        if amount > most:
            raise over_limit(field, self._limit, amount, most)
        now_s = self._clock()
        used = self._now(tenant, most, now_s) + amount
        if used > most:
            retry_s = (used - most) * WINDOW_S / most
            raise quota_exceeded(self._limit, most, round(used), max(retry_s, 0.1))
        self._used.pop(tenant, None)
        self._used[tenant] = used, now_s
        if len(self._used) > TENANTS_MAX:
            del self._used[next(iter(self._used))]

    def give_back(self, tenant: str, amount: int, most: int) -> None:
        """Some of what was taken was not used."""
        if tenant in self._used and most:
            now_s = self._clock()
            self._used[tenant] = max(0.0, self._now(tenant, most, now_s) - amount), now_s

    def _now(self, tenant: str, most: int, now_s: float) -> float:
        used, since_s = self._used.get(tenant, (0.0, now_s))
        return max(0.0, used - (now_s - since_s) * most / WINDOW_S)
