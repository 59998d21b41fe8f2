"""Tells the Checkpoint server which models are gone: it drops their ephemeral weights.

Neither side writes this down. The Checkpoint server says for which models of this cluster it still
keeps something, and those that are not here are gone: nobody uses an id twice, and a model is here
before anything of it is saved. So it does not matter which of the two was away when.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from tinsmithd.errors import TinsmithError

INTERVAL_S = 60.0
"""Between two questions what the Checkpoint server keeps."""
RETRY_S = 5.0
"""After a try that failed."""
MODELS_MAX = 1000
"""Maximum number of models in one call."""

_log = logging.getLogger(__name__)


class ReleasesModels(Protocol):
    """The Checkpoint server."""

    async def release_models(self, model_ids: Sequence[str]) -> Sequence[str]:
        """Say which models are gone; returns those that it keeps something for."""


class Releases:
    """The deleted models that the Checkpoint server may not know of.

    Args:
        client: The Checkpoint server.
        exists: Whether there is a model of this id.
    """

    def __init__(self, client: ReleasesModels, exists: Callable[[str], bool]) -> None:
        self._client = client
        self._exists = exists
        self._gone: dict[str, None] = {}
        self._wake = asyncio.Event()
        self._failing = False

    def deleted(self, model_id: str) -> None:
        """A model was deleted."""
        self._gone[model_id] = None
        self._wake.set()

    async def run(self) -> None:
        """Tell, until cancelled."""
        while True:
            try:
                await self._tell()
            except TinsmithError as error:
                if not self._failing:
                    text = "the Checkpoint server hears later which models are gone: %s"
                    _log.warning(text, error)
                self._failing = True
                await asyncio.sleep(RETRY_S)
                continue
            self._failing = False
            if not self._gone:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(INTERVAL_S):
                        await self._wake.wait()
            self._wake.clear()

    async def _tell(self) -> None:
        told = list(self._gone)[:MODELS_MAX]
        kept = await self._client.release_models(told)
        for model_id in told:
            self._gone.pop(model_id, None)
        known = set(told)
        unknown = [found for found in kept if found not in known and not self._exists(found)]
        self._gone.update(dict.fromkeys(unknown))
