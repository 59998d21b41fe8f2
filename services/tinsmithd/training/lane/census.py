"""Which lanes are in a state that somebody counts, so that nobody looks at all of them for it."""

from collections.abc import Sequence
from typing import Protocol

PURGE_MIN = 64
"""Number of lanes below which nobody looks for those that are at rest."""


class Counted(Protocol):
    """A lane, as far as it is counted."""

    @property
    def pending(self) -> int:
        """Calls that were taken in and are not answered."""

    @property
    def recovering(self) -> bool:
        """True while the ranks do not have the model's state and should."""

    @property
    def resuming(self) -> bool:
        """True while a suspended model is brought back because of a call."""


class Census:
    """The lanes of one process, by the ids of their models. Lives on one event loop.

    Attributes:
        suspended: Those whose models are on disk alone until they are called.
        lost: Those whose models' state is gone.
    """

    def __init__(self) -> None:
        self.suspended: set[str] = set()
        self.lost: set[str] = set()
        self._stirred: dict[str, Counted] = {}
        self._purge_at = PURGE_MIN

    @property
    def stirred(self) -> Sequence[Counted]:
        """Those that have calls, or whose models the ranks should have and have not; another thread
        may ask."""
        return [lane for _, lane in self.active()]

    def active(self) -> Sequence[tuple[str, Counted]]:
        """The same, with the ids of their models."""
        known = list(self._stirred.items())
        return [each for each in known if each[1].pending or each[1].recovering]

    def stirs(self, model_id: str, lane: Counted) -> None:
        """Something came to a lane; those that are at rest again are dropped now and then."""
        self._stirred[model_id] = lane
        if len(self._stirred) > self._purge_at:
            self._stirred = {**dict(self.active()), model_id: lane}
            self._purge_at = max(PURGE_MIN, 2 * len(self._stirred))

    def closed(self, model_id: str, *, lost: bool) -> None:
        """A lane takes no calls any more."""
        self.suspended.discard(model_id)
        if lost:
            self.lost.add(model_id)

    def gone(self, model_id: str) -> None:
        """A model is gone, and its lane with it."""
        for found in (self.suspended, self.lost):
            found.discard(model_id)
        self._stirred.pop(model_id, None)
