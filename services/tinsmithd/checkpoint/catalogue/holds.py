"""Which ephemeral checkpoints other processes said are in use. Its calls come one at a time."""

from collections.abc import Callable, Iterable

from tinsmithd.checkpoint.catalogue.rows import Change


class Holds:
    """What was heard.

    Args:
        hold_s: How long what another process said counts, seconds.
        monotonic: A clock that nobody sets.
    """

    def __init__(self, hold_s: float, monotonic: Callable[[], float]) -> None:
        self._hold_s, self._monotonic = hold_s, monotonic
        self._held: dict[int, float] = {}
        self.hold_all()

    def hold_all(self) -> None:
        """Nothing is known of what was said before this process listens: all are in use."""
        self._all_until_s = self._monotonic() + self._hold_s

    def hear(self, changes: Iterable[Change]) -> None:
        """Note what another process says is in use: what it has just made, too."""
        until_s = self._monotonic() + self._hold_s
        for what, value, *_ in changes:
            for number in value if what == "hold" else [value] if what == "put" else ():
                self._held[number] = until_s
            if what == "remove":
                self._held.pop(value, None)

    def of(self, numbers: Iterable[int]) -> set[int]:
        """Those of these that are in use."""
        now_s = self._monotonic()
        if self._all_until_s > now_s:
            return set(numbers)
        self._held = {n: until_s for n, until_s in self._held.items() if until_s > now_s}
        return {number for number in numbers if number in self._held}
