"""A bounded amount of something that many peers share: no peer can take all of it.

What is taken is given back by a lease, whatever happens to its holder. Thread-safe.
"""

import threading

from tinsmithd.errors import Reason, ResourceExhausted

RETRY_AFTER_S = 1.0


class Budget:
    """An amount that leases take from.

    Args:
        limit: Name of the setting that bounds it.
        most: The bound.
        peer_share_max: Share of it, 0 to 1, that one peer may have; at least one unit.

    Attributes:
        most: The bound.
    """

    def __init__(self, limit: str, most: int, peer_share_max: float) -> None:
        self._limit = limit
        self.most = most
        self._peer_most = max(1, int(most * peer_share_max))
        self._peer_share_max = peer_share_max
        self._lock = threading.Lock()
        self._taken = 0
        self._by_peer: dict[str, int] = {}

    @property
    def taken(self) -> int:
        """What is taken now."""
        return self._taken

    def lease(self, peer: str) -> "Lease":
        """An empty lease for a peer."""
        return Lease(self, peer)

    def take(self, peer: str, amount: int) -> None:
        """Take for a peer; see `Lease.take`."""
        with self._lock:
            taken, of_peer = self._taken + amount, self._by_peer.get(peer, 0) + amount
            if taken <= self.most and of_peer <= self._peer_most:
                self._taken = taken
                self._by_peer[peer] = of_peer
                return
        if taken > self.most:
            message = f"the server is full: {self._limit} is {self.most}"
            raise server_busy(message, self._limit, taken)
        message = (
            f"{peer} has its share of the server: peer_share_max is {self._peer_share_max:g} of "
            f"{self._limit}, {self.most}"
        )
        raise server_busy(message, "peer_share_max", of_peer)

    def give(self, peer: str, amount: int) -> None:
        """Give back what was taken for a peer."""
        with self._lock:
            self._taken -= amount
            self._by_peer[peer] -= amount
            if not self._by_peer[peer]:
                del self._by_peer[peer]


class Lease:
    """What one holder has of a budget; a context manager that gives all of it back.

    Attributes:
        amount: What it has now.
    """

    def __init__(self, budget: Budget, peer: str) -> None:
        self._budget = budget
        self._peer = peer
        self.amount = 0

    def take(self, amount: int) -> None:
        """Take more.

        Raises:
            ResourceExhausted: Too little is left, in all or for this peer (SERVER_BUSY).
        """
        self._budget.take(self._peer, amount)
        self.amount += amount

    def give_back(self) -> None:
        """Give all of it back; more can be taken afterwards."""
        amount, self.amount = self.amount, 0
        if amount:
            self._budget.give(self._peer, amount)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()


def server_busy(message: str, limit: str, value: int | None = None) -> ResourceExhausted:
    """The refusal of a call for which there is no room now (SERVER_BUSY).

    Args:
        message: One sentence.
        limit: The setting that says how much room there is.
        value: What there would be with the call.
    """
    metadata = {"limit": limit}
    if value is not None:
        metadata["value"] = str(value)
    return ResourceExhausted(
        message, Reason.SERVER_BUSY, retry_after_s=RETRY_AFTER_S, metadata=metadata
    )
