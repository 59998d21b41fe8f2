"""The file of keys: who may call, as an administrator writes it and all servers read it.

A key is a secret of 256 random bits. The file has its BLAKE2b under a secret of the file's own, so
that whoever reads the file, or a backup of it, can call nobody. It is written whole and put in the
place of the old one, under a lock: readers find the old one or the new one.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tinsmithd.keys.callers import LIMIT_NAMES, Scope
from tinsmithd.owners import DEFAULT_OWNER, OWNER_PATTERN

T = TypeVar("T")

PREFIX = "tml-"
"""What keys begin with: Tinker's SDKs take no others."""
RANDOM_BYTES = 32
CHARACTERS_MAX = 256
NOTE_CHARACTERS_MAX = 200
DIGEST_BYTES = 32
FORMAT = 1
FILE_BYTES_MAX = 64 * 1024 * 1024
_KEY_ID = re.compile("[0-9a-f]{12}")


class KeyFileError(Exception):
    """The file cannot be used, or a change of it makes no sense; the message says why."""


@dataclass(frozen=True)
class KeyRecord:
    """What the file has of a key.

    Attributes:
        key_id: Names it; no secret.
        tenant: Whose it is.
        scope: What it is for.
        created_s: When it was made, seconds since 1970.
        expires_s: From when on it is refused; None: never.
        note: What a person wrote about it.
        digest: See `digest_of`, in hex.
    """

    key_id: str
    tenant: str
    scope: Scope
    created_s: float
    expires_s: float | None = None
    note: str = ""
    digest: str = field(default="", repr=False)

    def is_expired(self, now_s: float) -> bool:
        """Whether it is refused by now."""
        return self.expires_s is not None and self.expires_s <= now_s


@dataclass(frozen=True)
class NewKey:
    """A key that was just made: `text` is shown once and is written down nowhere."""

    text: str = field(repr=False)
    record: KeyRecord


@dataclass(frozen=True)
class Contents:
    """All that the file has.

    Attributes:
        secret: What digests are made with; 32 bytes.
        keys: By `key_id`, in the order in which they were made.
        limits: Of tenants, by name, those that are not the settings'.
    """

    secret: bytes = field(repr=False)
    keys: Mapping[str, KeyRecord]
    limits: Mapping[str, Mapping[str, int]]


def digest_of(secret: bytes, text: str) -> bytes:
    """What the file has in place of a key."""
    data = text.encode("utf-8", "surrogateescape")
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES, key=secret).digest()


class KeyFile:
    """The file; every method reads it anew.

    Args:
        path: Where it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    # --- to read ------------------------------------------------------------------------------

    def read(self) -> Contents:
        """All that it has.

        Raises:
            KeyFileError: There is none, or it is none that this release reads.
        """
        try:
            with self.path.open("rb") as reading:
                data = reading.read(FILE_BYTES_MAX + 1)
        except OSError as error:
            raise KeyFileError(f"cannot read {self.path}: {error.strerror}") from error
        if len(data) > FILE_BYTES_MAX:
            raise KeyFileError(f"{self.path}: has more than {FILE_BYTES_MAX} bytes")
        try:
            document = json.loads(data)
            if isinstance(found := document["format"], int) and found > FORMAT:
                # Not `tinsmith keys create`: a later release has written keys that are in use.
                why = f"has format {found}, and this release knows {FORMAT} and older"
                raise KeyFileError(f"{self.path}: {why}; start the release that wrote it")
            return _contents(document)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            # Not the error's own words: they may have part of the file in them.
            why = f"is no file of keys of format {FORMAT} ({type(error).__name__})"
            raise KeyFileError(f"{self.path}: {why}; `tinsmith keys create` makes one") from None

    def list(self) -> list[KeyRecord]:
        """All keys, in the order in which they were made; no secrets are among it.

        Raises:
            KeyFileError: As `read`.
        """
        return [dataclasses.replace(each, digest="") for each in self.read().keys.values()]

    # --- to change ----------------------------------------------------------------------------

    def create(
        self,
        tenant: str = "",
        scope: Scope | str = Scope.TENANT,
        *,
        expires_in_s: float | None = None,
        note: str = "",
    ) -> NewKey:
        """Make a key, and the file where there is none yet.

        Args:
            tenant: Whose it is to be; empty: `default`, who has what was made before there were
                keys. A server's is nobody's.
            scope: What it is for.
            expires_in_s: Seconds until it is refused; None: never.
            note: For people.

        Raises:
            KeyFileError: One of these makes no sense, or the file cannot be used.
        """
        tenant = tenant or DEFAULT_OWNER
        if not OWNER_PATTERN.fullmatch(tenant):
            raise KeyFileError(f"tenant: must match {OWNER_PATTERN.pattern}")
        if scope not in list(Scope):
            raise KeyFileError(f"scope: must be one of {', '.join(Scope)}")
        if expires_in_s is not None and not 0 < expires_in_s < float("inf"):
            raise KeyFileError("expires_in_s: must be above 0")
        if len(note) > NOTE_CHARACTERS_MAX or not note.isprintable():
            message = f"at most {NOTE_CHARACTERS_MAX} characters that can be printed"
            raise KeyFileError(f"note: must have {message}")
        text = PREFIX + secrets.token_urlsafe(RANDOM_BYTES)
        now_s = time.time()

        def add(found: Contents) -> tuple[Contents, NewKey]:
            record = KeyRecord(
                _new_id(found),
                tenant,
                Scope(scope),
                now_s,
                None if expires_in_s is None else now_s + expires_in_s,
                note,
                digest_of(found.secret, text).hex(),
            )
            keys = {**found.keys, record.key_id: record}
            shown = dataclasses.replace(record, digest="")
            return dataclasses.replace(found, keys=keys), NewKey(text, shown)

        return self._change(add, may_make=True)

    def revoke(self, key_id: str) -> KeyRecord:
        """Take a key away; servers refuse it within a second. Returns what it was.

        Raises:
            KeyFileError: There is none of this id, or the file cannot be used.
        """

        def remove(found: Contents) -> tuple[Contents, KeyRecord]:
            keys = dict(found.keys)
            gone = keys.pop(key_id, None)
            if gone is None:
                raise KeyFileError(f"{self.path}: has no key {key_id[:40]!r}")
            return dataclasses.replace(found, keys=keys), dataclasses.replace(gone, digest="")

        return self._change(remove)

    def set_limits(self, tenant: str, limits: Mapping[str, int | None]) -> Mapping[str, int]:
        """Change limits of a tenant; returns those that are not the settings' now.

        Args:
            tenant: Whose.
            limits: By their names, see `LIMIT_NAMES`; 0 is no limit, None goes back to the setting.

        Raises:
            KeyFileError: One of these makes no sense, or the file cannot be used.
        """
        if not OWNER_PATTERN.fullmatch(tenant):
            raise KeyFileError(f"tenant: must match {OWNER_PATTERN.pattern}")
        for name, value in limits.items():
            if name not in LIMIT_NAMES:
                raise KeyFileError(f"{name}: is no limit; there are {', '.join(LIMIT_NAMES)}")
            if value is not None and not _is_limit(value):
                raise KeyFileError(f"{name}: must be a whole number, at least 0")

        def change(found: Contents) -> tuple[Contents, Mapping[str, int]]:
            merged = {**found.limits.get(tenant, {}), **limits}
            kept = {name: value for name, value in merged.items() if value is not None}
            return dataclasses.replace(found, limits={**found.limits, tenant: kept}), kept

        return self._change(change)

    def _change(
        self, change: Callable[[Contents], tuple[Contents, T]], *, may_make: bool = False
    ) -> T:
        try:
            with self._locked():
                if may_make and not self.path.exists():
                    found = Contents(secrets.token_bytes(DIGEST_BYTES), {}, {})
                else:
                    found = self.read()
                changed, result = change(found)
                self._write(changed)
                return result
        except OSError as error:
            raise KeyFileError(f"cannot write {self.path}: {error.strerror}") from error

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # The lock has a file of its own, since the other one is replaced.
        lock = self.path.with_name(f".{self.path.name}.lock")
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _write(self, contents: Contents) -> None:
        part = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}")
        mode = 0o600
        with contextlib.suppress(
            FileNotFoundError
        ):  # whom an administrator lets read it, still may
            mode = self.path.stat().st_mode & 0o660
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with os.fdopen(descriptor, "w") as writing:
                os.fchmod(writing.fileno(), mode)
                json.dump(_document(contents), writing, indent=1)
                writing.write("\n")
                writing.flush()
                os.fsync(writing.fileno())
            os.replace(part, self.path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)
            raise
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _new_id(found: Contents) -> str:
    while (key_id := secrets.token_hex(6)) in found.keys:
        pass
    return key_id


def _is_limit(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


# --- the form of the file -------------------------------------------------------------------------


def _document(contents: Contents) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "secret": contents.secret.hex(),
        "keys": [dataclasses.asdict(each) for each in contents.keys.values()],
        "limits": {tenant: dict(each) for tenant, each in contents.limits.items() if each},
    }


def _contents(document: Any) -> Contents:
    if document["format"] != FORMAT:
        raise ValueError("another format")
    secret = bytes.fromhex(document["secret"])
    if len(secret) != DIGEST_BYTES:
        raise ValueError("secret")
    keys = {}
    for each in document["keys"]:
        record = KeyRecord(**{**each, "scope": Scope(each["scope"])})
        _check(record)
        if record.key_id in keys:
            raise ValueError("a key is there twice")
        keys[record.key_id] = record
    limits = {}
    for tenant, values in document["limits"].items():
        if not set(values) <= set(LIMIT_NAMES) or not all(map(_is_limit, values.values())):
            raise ValueError("limits")
        limits[tenant] = dict(values)
    return Contents(secret, keys, limits)


def _check(record: KeyRecord) -> None:
    if not _KEY_ID.fullmatch(record.key_id) or not OWNER_PATTERN.fullmatch(record.tenant):
        raise ValueError("key_id or tenant")
    if len(bytes.fromhex(record.digest)) != DIGEST_BYTES or not isinstance(record.note, str):
        raise ValueError("digest or note")
    if not isinstance(record.created_s, int | float):
        raise TypeError("created_s")
    if record.expires_s is not None and not isinstance(record.expires_s, int | float):
        raise TypeError("expires_s")
