"""Which tenants metrics name: some that were chosen, and the first others, up to a bound.

A tenant that has a series of its own keeps it while the process lives, since a counter that changed
its name would rise and fall by what others do. All the rest share one. So nobody makes a server
hold, or Prometheus store, more series than its settings say, whatever names tenants have.
"""

import threading
from collections.abc import Collection, Mapping

from tinsmithd.owners import OWNER_PATTERN

THE_REST = "(other)"
"""In place of the names of all other tenants: no tenant can be called so."""
TENANTS_NAMED_MAX = 1000
"""Maximum number of tenants that settings may have named."""


class Tenants:
    """Names tenants for metrics. Thread-safe.

    Args:
        chosen: Tenants that always have series of their own.
        others_max: Number of others that may have some: those that come first.
    """

    def __init__(self, chosen: Collection[str] = (), others_max: int = 0) -> None:
        self._named = frozenset(chosen)
        self._others: set[str] = set()
        self._others_max = others_max
        self._lock = threading.Lock()

    @property
    def are_named(self) -> bool:
        """Whether metrics tell tenants apart at all."""
        return bool(self._named or self._others_max)

    def label(self, owner: str) -> str:
        """What metrics call a tenant."""
        if owner in self._named or owner in self._others:
            return owner
        if len(self._others) >= self._others_max or not OWNER_PATTERN.fullmatch(owner):
            return THE_REST
        with self._lock:
            if len(self._others) < self._others_max:
                self._others.add(owner)
            return owner if owner in self._others else THE_REST

    def named(self) -> list[str]:
        """Tenants that have series of their own, as far as they are known."""
        return sorted({*self._named, *list(self._others)})


NO_TENANTS = Tenants()
"""Metrics tell no tenants apart."""


class TenantCounter:
    """An amount that only rises, by what metrics call a tenant. Lives on one event loop.

    Args:
        tenants: Names them.
    """

    def __init__(self, tenants: Tenants = NO_TENANTS) -> None:
        self._tenants = tenants
        self._amounts: dict[str, int] = {}

    @property
    def counts(self) -> bool:
        """Whether it counts at all."""
        return self._tenants.are_named

    def add(self, owner: str, amount: int) -> None:
        """Count for a tenant."""
        if self.counts:
            label = self._tenants.label(owner)
            self._amounts[label] = self._amounts.get(label, 0) + amount

    def amounts(self) -> Mapping[str, int]:
        """The amounts so far; another thread may ask."""
        return dict(self._amounts)
