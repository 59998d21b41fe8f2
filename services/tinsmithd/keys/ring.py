"""The keys as a server knows them: those of the file, as it was a moment ago."""

import hmac
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from tinsmithd.keys.callers import Caller, Scope
from tinsmithd.keys.file import CHARACTERS_MAX, PREFIX, KeyFile, KeyFileError, KeyRecord, digest_of
from tinsmithd.owners import ANY_OWNER

LOOK_INTERVAL_S = 0.25
"""How old what is known of the file may be: a key that was revoked is refused after this long."""
SAY_INTERVAL_S = 60.0
_NO_DIGEST = bytes(32)

_log = logging.getLogger(__name__)


class KeyRing:
    """Says who a key stands for. Lives on one thread.

    A file that cannot be read any more changes nothing: an unlucky edit must not end everybody's
    work. It is said in the log again and again.

    Args:
        path: The file of keys.
        clock: The time of day, seconds since 1970.
        monotonic: A clock that nobody sets, seconds.

    Raises:
        KeyFileError: It cannot be used.
    """

    def __init__(
        self,
        path: Path,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = KeyFile(path)
        self._clock, self._monotonic = clock, monotonic
        self._mark = self._mark_of_file()
        self._looked_s = monotonic()
        self._said_s = float("-inf")
        self._load()

    def caller(self, text: str) -> Caller | None:
        """Who shows a key; None where it is none, was revoked, or has expired.

        It takes as long for every text of the form of a key that is none.
        """
        self._look()
        if not text.startswith(PREFIX) or len(text) > CHARACTERS_MAX:
            return None
        digest = digest_of(self._secret, text)
        found = self._known.get(digest)
        # To find the digest says nothing of the key: nobody without the file's secret can make one.
        kept = _NO_DIGEST if found is None else bytes.fromhex(found[0].digest)
        if not hmac.compare_digest(kept, digest) or found is None:
            return None
        record, caller = found
        return None if record.is_expired(self._clock()) else caller

    def holds(self, key_id: str) -> bool:
        """Whether a key that was good still is."""
        self._look()
        record = self._records.get(key_id)
        return record is not None and not record.is_expired(self._clock())

    def _look(self) -> None:
        now_s = self._monotonic()
        if now_s - self._looked_s < LOOK_INTERVAL_S:
            return
        self._looked_s = now_s
        mark = self._mark_of_file()
        if mark == self._mark and mark is not None:
            return
        try:
            self._load()
        except KeyFileError as error:
            self._mark = None  # and look again
            if now_s - self._said_s >= SAY_INTERVAL_S:
                self._said_s = now_s
                _log.error("the keys stay as they were: %s", error)
            return
        self._mark, self._said_s = mark, float("-inf")
        _log.info("%s changed: %d key(s)", self._file.path, len(self._records))

    def _mark_of_file(self) -> tuple[int, ...] | None:
        try:
            found = os.stat(self._file.path)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_dev, found.st_size

    def _load(self) -> None:
        contents = self._file.read()
        self._secret, self._records = contents.secret, contents.keys
        self._known: dict[bytes, tuple[KeyRecord, Caller]] = {}
        for record in contents.keys.values():
            is_server = record.scope is Scope.SERVER
            caller = Caller(
                ANY_OWNER if is_server else record.tenant,
                record.scope,
                record.key_id,
                contents.limits.get(record.tenant, {}),
            )
            self._known[bytes.fromhex(record.digest)] = record, caller
        self._limits = contents.limits

    def limits_of(self, owner: str) -> dict[str, int]:
        """Limits of a tenant that are not the settings'."""
        self._look()
        return dict(self._limits.get(owner, {}))
