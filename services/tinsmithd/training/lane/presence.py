"""Whether the ranks have a model's state, and if not, why not."""


class Presence:
    """Of one model.

    Attributes:
        leaving: It is to leave the ranks before its next call.
        suspended: It left them, and its next call brings it back.
        resuming: It is being brought back because of a call, not because the ranks were lost.
    """

    def __init__(self) -> None:
        self.leaving = self.suspended = self.resuming = False
        self._losses = self._restored_losses = 0

    @property
    def absent(self) -> bool:
        """True while the ranks do not have it."""
        return self._losses != self._restored_losses

    def lose(self) -> None:
        """The ranks do not have it any more, or not as it should be."""
        self._losses += 1
        self.resuming = False

    def suspend(self) -> None:
        """It left the ranks."""
        self.lose()
        self.leaving, self.suspended = False, True

    def begin(self) -> int:
        """Start to bring it back; returns what `end` takes."""
        self.resuming = self.resuming or self.suspended
        self.suspended = False
        return self._losses

    def end(self, losses: int) -> None:
        """It is back, unless it was lost again since `begin`."""
        self._restored_losses = losses
        self.resuming = self.resuming and self.absent
