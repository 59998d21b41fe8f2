"""An issuer's keys as they are known here: fetched beside all else, kept while it is away."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable

from tinsmithd.config import CalledConfig
from tinsmithd.errors import Reason, Unavailable
from tinsmithd.oidc.published import PublishedKey, PublishedKeys
from tinsmithd.oidc.visit import IssuerError, Visit

WAITING_MAX = 256
"""Callers that wait for a fetch at once: they hold no other place of the server yet."""
SAY_INTERVAL_S = 60.0

_log = logging.getLogger(__name__)


class Issuer:
    """The keys of an issuer. Lives on one event loop, which never waits for it.

    One fetch is under way at most, in a thread of its own, and `oidc_unknown_key_s` lie between the
    beginnings of two. What they bring takes the place of what was known; one that fails changes
    nothing.

    Args:
        settings: Which issuer, and how.
        monotonic: A clock that nobody sets, seconds.
    """

    def __init__(
        self, settings: CalledConfig, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._monotonic = monotonic
        self._keys = PublishedKeys()
        self._fetched_s = self._began_s = self._said_s = float("-inf")
        self._begun = self._finished = self._waiting = 0
        self._fetching: asyncio.Task[None] | None = None
        self._thread: threading.Thread | None = None
        self.failure = ""
        """Why the last fetch brought nothing; empty where it did."""

    def find(self, key_id: str | None, algorithm: str) -> PublishedKey | None:
        """The key of a token; see `PublishedKeys.find`. Nothing is waited for."""
        self.look()
        return self._keys.find(key_id, algorithm)

    def publishes(self, fingerprint: str) -> bool:
        """Whether a key is there that was there before."""
        self.look()
        return fingerprint in self._keys.fingerprints

    def look(self) -> None:
        """Have the keys fetched again soon, if what is known of them is old."""
        if self._monotonic() - self._fetched_s > self._settings.oidc_refresh_s:
            self._next()

    async def find_newer(self, key_id: str | None, algorithm: str) -> PublishedKey | None:
        """The key of a token that was not there: once a fetch that begins from now on has ended,
        whatever it brought, or one that is under way has brought it.

        Raises:
            Unavailable: Too many wait already.
        """
        if self._waiting >= WAITING_MAX:
            raise self.away("many tokens wait for the keys of their issuer")
        self._waiting += 1
        try:
            wanted, found = self._begun + 1, None
            while found is None and self._finished < wanted:
                await asyncio.shield(self._next())
                found = self._keys.find(key_id, algorithm)
            return found
        finally:
            self._waiting -= 1

    def away(self, why: str) -> Unavailable:
        """The refusal of a call of which nobody can tell now who makes it."""
        delay_s = self._settings.oidc_unknown_key_s
        return Unavailable(why, Reason.ISSUER_UNAVAILABLE, retry_after_s=delay_s)

    def _next(self) -> asyncio.Task[None]:
        """The fetch that is under way, or comes next."""
        if self._fetching is None:
            self._fetching = asyncio.create_task(self._fetch())
        return self._fetching

    async def _fetch(self) -> None:
        try:
            pause_s = self._began_s + self._settings.oidc_unknown_key_s - self._monotonic()
            await asyncio.sleep(max(0.0, pause_s))
            self._begun += 1
            self._began_s = began_s = self._monotonic()
            try:
                keys = await self._visited()
            except IssuerError as error:
                self._failed(str(error))
            else:
                self._took(keys, began_s)
        finally:
            self._finished = self._begun
            self._fetching = None

    async def _visited(self) -> PublishedKeys:
        """What a visit brings, or IssuerError."""
        if self._thread is not None and self._thread.is_alive():
            raise IssuerError("the last fetch hangs still")
        loop = asyncio.get_running_loop()
        came: asyncio.Future[PublishedKeys] = loop.create_future()
        visit = Visit(self._settings)

        def settle(keys: PublishedKeys, failure: IssuerError | None) -> None:
            if not came.done() and failure is not None:
                came.set_exception(failure)
            elif not came.done():
                came.set_result(keys)

        def run() -> None:
            keys, failure = PublishedKeys(), None
            try:
                keys = visit.keys()
            except IssuerError as error:
                failure = error
            except Exception as error:  # what nobody foresaw must not leave callers waiting
                failure = IssuerError(type(error).__name__)
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(settle, keys, failure)

        # Not one of the loop's own threads: the end of the process would wait for it.
        self._thread = threading.Thread(target=run, name="oidc", daemon=True)
        self._thread.start()
        try:
            async with asyncio.timeout(self._settings.oidc_timeout_s):
                return await came
        except TimeoutError:
            timeout_s = self._settings.oidc_timeout_s
            raise IssuerError(f"it took longer than oidc_timeout_s = {timeout_s:g} s") from None
        finally:
            visit.end()

    def _took(self, keys: PublishedKeys, began_s: float) -> None:
        if self.failure or keys.fingerprints != self._keys.fingerprints:
            _log.info("%s has %d key(s) for tokens", self._settings.oidc_issuer, len(keys))
        self._keys, self._fetched_s = keys, began_s
        self.failure, self._said_s = "", float("-inf")

    def _failed(self, why: str) -> None:
        self.failure = why
        now_s = self._monotonic()
        if now_s - self._said_s < SAY_INTERVAL_S:
            return
        self._said_s = now_s
        kept = (
            f"the {len(self._keys)} that are known stay good" if len(self._keys) else "none known"
        )
        _log.error("no keys of %s for tokens, %s: %s", self._settings.oidc_issuer, kept, why)
