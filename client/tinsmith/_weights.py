"""What a SamplingClient samples from, and the lease that keeps it there."""

from typing import NamedTuple

from tinsmith._connection import Connection
from tinsmith._leases import is_ephemeral


class Named(NamedTuple):
    """Weights at one moment.

    Attributes:
        path: The checkpoint's path, or None for the base model itself.
        digest: Of its content; empty where any content of that name will do.
    """

    path: str | None
    digest: bytes


class Weights:
    """One set of weights, or what moves from one to the next.

    Args:
        connection: Whose leases hold them.
        path: As in `Named`.
        digest: Likewise.
        lease_id: A lease that the service knows of already; may be empty.
        moves: Whether `move` is called: then several clients share this, and none of them lets go
            of it before all do.
    """

    def __init__(
        self,
        connection: Connection,
        path: str | None,
        digest: bytes = b"",
        lease_id: str = "",
        *,
        moves: bool = False,
    ) -> None:
        self._leases = connection.leases
        self._moves = moves
        self._turn = 0
        self._lease_ids: list[str] = []
        self._hold(path, digest, lease_id)

    def _hold(self, path: str | None, digest: bytes, lease_id: str) -> None:
        if path is not None and is_ephemeral(path):
            self._lease_ids.append(self._leases.hold(self, path, lease_id))
        self.now = Named(path, digest)

    def move(self, path: str, digest: bytes, lease_id: str, turn: int) -> None:
        """Go on to newer weights, on the loop.

        Calls that were begun with those before may still need them: they go with the next move.

        Args:
            path: As in `Named`.
            digest: Likewise.
            lease_id: Of the new ones.
            turn: Newer weights have a higher one; older ones come too late.
        """
        if turn < self._turn:
            self._leases.hold(self, path, lease_id)
            self._leases.let_go(lease_id)
            return
        self._turn = turn
        self._hold(path, digest, lease_id)
        while len(self._lease_ids) > 2:
            self._leases.let_go(self._lease_ids.pop(0))

    def hand_on(self) -> None:
        """Another process may be on its way to a lease of its own."""
        if self._lease_ids:
            self._leases.hand_on(self._lease_ids[-1])

    def close(self) -> None:
        """Let go of them at once."""
        while self._lease_ids and not self._moves:
            self._leases.let_go(self._lease_ids.pop())
