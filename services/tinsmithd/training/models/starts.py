"""How often the ranks died, by themselves, while something was put onto them.

A call is counted under its place in its model's order. What has none yet, a creation, is counted
under its request, and whatever comes from a checkpoint under what that holds: sent again and again,
by whoever, it must not end the ranks again and again.
"""

import contextlib
from collections.abc import AsyncIterator, Mapping

from tinsmithd.errors import FailedPrecondition, Reason
from tinsmithd.training.journal import CountStart, Journal
from tinsmithd.training.ranks import ModelBroken, RankGroupLost


class Starts:
    """Counts attempts, durably; what succeeds once is forgotten.

    Args:
        journal: Where they are written down.
        attempts_max: `call_attempts_max`.
    """

    def __init__(self, journal: Journal, attempts_max: int) -> None:
        self._journal = journal
        self._attempts_max = attempts_max
        self._attempts: dict[str, int] = {}

    def recall(self, attempts: Mapping[str, int]) -> None:
        """Go on from what the journal has."""
        self._attempts.update(attempts)

    def check(self, key: str) -> None:
        """Refuse what the ranks died of too often.

        Args:
            key: See `key_of_checkpoint` and `key_of_request`; empty: it cannot be known again.

        Raises:
            FailedPrecondition: See above (CALL_POISONED).
        """
        attempts = self._attempts.get(key, 0)
        if attempts >= self._attempts_max:
            raise FailedPrecondition(
                f"the ranks failed {attempts} times during this; it is not tried again",
                Reason.CALL_POISONED,
                metadata={"attempts": str(attempts)},
            )

    @contextlib.asynccontextmanager
    async def attempt(self, key: str) -> AsyncIterator[None]:
        """Count the body of the `async with`, where the ranks die of it.

        Raises:
            FailedPrecondition: They did too often, before it began (CALL_POISONED).
            Fenced: Another process has the journal.
        """
        self.check(key)
        try:
            yield
        except (RankGroupLost, ModelBroken) as error:
            if error.blamed:
                await self._failed(key)
            raise
        # The ranks took it: what they died of before was something else.
        if self._attempts.pop(key, 0):
            self._journal.commit(CountStart(key, 0), must=True)

    async def _failed(self, key: str) -> None:
        if key:
            self._attempts[key] = self._attempts.get(key, 0) + 1
            await self._journal.commit(CountStart(key, self._attempts[key]), must=True)


def key_of_checkpoint(digest: bytes) -> str:
    """Of whatever takes this content in."""
    return f"checkpoint {digest.hex()}" if digest else ""


def key_of_request(request_id: str) -> str:
    """Of a creation without a checkpoint."""
    return f"request {request_id}" if request_id else ""
