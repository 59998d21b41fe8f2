"""How much of the journal the calls of one model hold."""

from collections.abc import Sequence

from tinsmithd.errors import Reason, ResourceExhausted


class _BytesByPosition:
    """Bytes of calls by position; positions rise."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}
        self.nbytes = 0

    def add(self, position: int, nbytes: int) -> None:
        if nbytes:
            self._sizes[position] = nbytes
            self.nbytes += nbytes

    def drop(self, positions: Sequence[int]) -> None:
        for position in positions:
            self.nbytes -= self._sizes.pop(position, 0)

    def drop_until(self, end: int) -> None:
        """Drop those up to this position."""
        while self._sizes and (first := next(iter(self._sizes))) <= end:
            self.drop([first])


class JournalRoom:
    """Counts the bytes of one model's calls that the journal cannot drop yet.

    Args:
        bytes_max: `journal_bytes_max`.
        keeps: Whether the journal keeps anything.
    """

    def __init__(self, bytes_max: int, *, keeps: bool) -> None:
        self._bytes_max = bytes_max
        self._keeps = keeps
        self._since_step, self._since_snapshot = _BytesByPosition(), _BytesByPosition()

    @property
    def filling(self) -> bool:
        """Whether a snapshot should make room soon."""
        return 2 * self._since_snapshot.nbytes > self._bytes_max

    def check(self, nbytes: int) -> None:
        """Refuse a call that would make the journal of this model too large.

        Raises:
            ResourceExhausted: Its calls since the last snapshot are too many (STORAGE_FULL).
        """
        held = nbytes + self._since_step.nbytes
        # A call without data must get in: the step among them is what makes room.
        if nbytes and self._keeps and held > self._bytes_max:
            raise ResourceExhausted(
                f"calls of this model without a snapshot hold {held} bytes, journal_bytes_max is "
                f"{self._bytes_max}: an optim_step lets a snapshot be taken",
                Reason.STORAGE_FULL,
                retry_after_s=1.0,
                metadata={"limit": "journal_bytes_max", "value": str(held)},
            )

    def wrote(self, position: int, nbytes: int) -> None:
        """The journal was given a call."""
        self._since_step.add(position, nbytes)
        self._since_snapshot.add(position, nbytes)

    def forgot(self, positions: Sequence[int]) -> None:
        """Calls were taken back, to be written again, or are never made again."""
        self._since_step.drop(positions)
        self._since_snapshot.drop(positions)

    def stepped(self, position: int) -> None:
        """No gradients are pending after this position: a snapshot can be taken."""
        self._since_step.drop_until(position)

    def snapshot_at(self, position: int) -> None:
        """There is a snapshot of the state after this position."""
        self._since_snapshot.drop_until(position)
