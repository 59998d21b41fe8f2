"""Results that are kept in case they are asked for again, within bounds that callers share.

Who fills it loses results of its own: the oldest of whoever has most goes first.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from tinsmithd.gateway.callers import part

_OVERHEAD_BYTES = 1024


@dataclass(frozen=True)
class Answer:
    """A result as it is sent.

    Attributes:
        body: The bytes.
        media_type: What they are.
    """

    body: bytes
    media_type: str


@dataclass
class _Of:
    """The results of one caller, the one that was used longest ago first."""

    answers: OrderedDict[str, Answer] = field(default_factory=OrderedDict)
    nbytes: int = 0


class KeptAnswers:
    """Results by the names of their promises, of each caller for itself. Lives on one event loop.

    Args:
        bytes_max: Most bytes of all of them.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._of: dict[str, _Of] = {}
        self.nbytes = 0

    def __contains__(self, name: str) -> bool:
        found = self._of.get(part())
        return found is not None and name in found.answers

    def get(self, name: str) -> Answer | None:
        """A result of the caller's, which counts as a use of it."""
        found = self._of.get(part())
        if found is None or name not in found.answers:
            return None
        found.answers.move_to_end(name)
        return found.answers[name]

    def keep(self, name: str, answer: Answer) -> None:
        """Keep a result of the caller's; one that is larger than all may be is not kept."""
        if _nbytes(name, answer) > self._bytes_max:
            return
        self.forget(name)
        self._count(part(), _nbytes(name, answer))
        self._of[part()].answers[name] = answer
        while self.nbytes > self._bytes_max:
            whose = max(self._of, key=lambda each: self._of[each].nbytes)
            self._drop(whose, next(iter(self._of[whose].answers)))

    def forget(self, name: str) -> None:
        """Keep a result of the caller's no longer; harmless where there is none."""
        if name in self:
            self._drop(part(), name)

    def _drop(self, whose: str, name: str) -> None:
        gone = self._of[whose].answers.pop(name)
        self._count(whose, -_nbytes(name, gone))

    def _count(self, whose: str, nbytes: int) -> None:
        found = self._of.setdefault(whose, _Of())
        found.nbytes += nbytes
        self.nbytes += nbytes
        if not found.nbytes:
            del self._of[whose]


def _nbytes(name: str, answer: Answer) -> int:
    return len(answer.body) + len(name) + _OVERHEAD_BYTES
