"""How often the ranks died, by themselves, while something was put onto them.

The journal counts a call under its position. This counts a creation under its request, and whatever
takes in a checkpoint under the checkpoint's content: sent again and again, by anybody, it must not
end the ranks again and again.
"""

import contextlib
from collections.abc import AsyncIterator, Mapping

from tinsmithd.errors import FailedPrecondition, Reason
from tinsmithd.training.journal import CountStart, Journal
from tinsmithd.training.ranks import ModelBroken, RankGroupLost


class Starts:
    """Counts attempts, durably; one success forgets them.

    Args:
        journal: Keeps the counts.
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
        """Refuse to try again what ended the ranks too often.

        Args:
            key: See `key_of_checkpoint` and `key_of_request`; empty where nobody can know it again.

        Raises:
            FailedPrecondition: It did (CALL_POISONED).
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
        """Run the body of the `async with`, and count it if the ranks die of it.

        Raises:
            FailedPrecondition: They died of it too often before (CALL_POISONED).
            Fenced: Another process has the journal.
        """
        self.check(key)
        try:
            yield
        except (RankGroupLost, ModelBroken) as error:
            if error.blamed:
                await self._failed(key)
            raise
        # The ranks took it: they died of something else before.
        if self._attempts.pop(key, 0):
            self._journal.commit(CountStart(key, 0), must=True)

    async def _failed(self, key: str) -> None:
        if key:
            self._attempts[key] = self._attempts.get(key, 0) + 1
            await self._journal.commit(CountStart(key, self._attempts[key]), must=True)


def key_of_checkpoint(digest: bytes) -> str:
    """The key of whatever takes in this content."""
    return f"checkpoint {digest.hex()}" if digest else ""


def key_of_request(request_id: str) -> str:
    """The key of a creation without a checkpoint."""
    return f"request {request_id}" if request_id else ""
