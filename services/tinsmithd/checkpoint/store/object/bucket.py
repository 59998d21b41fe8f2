"""An object store as the rest of this room sees it: plain calls, and errors of this project.

Nobody else imports obstore. The first line of what it says is a note of the error: for who operates
the server, since it names the store; it has no header, and so no credential.
"""

import contextlib
import errno
import os
import re
import threading
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import obstore
from obstore import exceptions
from obstore.store import from_url

from tinsmithd.checkpoint.store.failures import RETRY_UNAVAILABLE_S, of_disk
from tinsmithd.checkpoint.store.interface import StoreUnusable
from tinsmithd.errors import DataLoss, Reason, TinsmithError, Unavailable

PART_BYTES = 8 * 1024 * 1024
"""Bytes of one request that reads or writes a part of an object."""
PARTS = 4
"""Parts of one object that are on their way at a time."""
PIECE_BYTES = 1024 * 1024
"""Most bytes that a reader gets at once."""
READERS = 32
"""Objects that are read a part ahead of whoever reads them, which keeps two parts in memory; all
others are read piece by piece, so that a thousand slow readers fill no memory."""
PAGE = 1000
"""Objects of one page of a list."""
PART_S = 120.0
"""A request for a part that takes longer failed: one at 70 kB/s ends in time."""
SMALL_S = 10.0
"""So did any other request that takes longer."""
CONNECT_S = 5.0
RETRIES = 4
RETRIES_S = 5.0
"""After this long a request is not made again: one that timed out is not."""
SCHEMES = ("s3", "s3a", "gs", "az", "adl", "azure", "abfs", "abfss", "file")
_HOSTS = ("amazonaws.com", "r2.cloudflarestorage.com", "windows.net", "microsoft.com")
_FULL = ("os error 28", "os error 122", "507 Insufficient Storage", "QuotaExceeded")
_WORDS = 300


class Object(NamedTuple):
    """What a list says of an object.

    Attributes:
        key: Its name below the store's prefix.
        size_bytes: Its length.
        modified: When it was written, by the store's clock.
    """

    key: str
    size_bytes: int
    modified: datetime


class Upload:
    """An object on its way in; it is there, whole, once `close` returned."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, data: bytes) -> None:
        """Append bytes; waits while `PARTS` parts are on their way.

        They are kept as they are until their part has gone, not copied: a buffer that is filled
        anew would change what is sent.
        """
        with _errors():
            self._writer.write(data)

    def close(self) -> None:
        """Make it."""
        with _errors():
            self._writer.close()


class Bucket:
    """Objects below one prefix.

    Args:
        url: Such as `s3://bucket/prefix`, `gs://...`, `az://...` or `file:///folder`.
        options: What obstore takes for this kind of store; the environment says the rest.
        authorities: Vouch for the store beside those that the machine knows (PEM).

    Raises:
        StoreUnusable: Such a store cannot be opened.

    Calls block. Besides what they say, all raise Unavailable (CHECKPOINT_UNAVAILABLE) where the
    store does not do it, and ResourceExhausted (STORAGE_FULL) where it is full.
    """

    def __init__(
        self, url: str, options: Mapping[str, str] | None = None, authorities: bytes = b""
    ) -> None:
        _check(url)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="read")
        self._ahead = threading.BoundedSemaphore(READERS)
        local, given = url.startswith("file:"), dict(options or {})

        def opened(request_s: float) -> Any:
            more = {"mkdir": True} if local else _requests(given, request_s, authorities)
            opening: Any = from_url  # which has a signature for each kind of store
            return opening(url, **given, **more)

        try:
            # For parts of objects, and for what is small and soon known to fail.
            self._slow, self._quick = opened(PART_S), opened(SMALL_S)
        except (exceptions.BaseError, ValueError, TypeError, OSError) as error:
            raise StoreUnusable(f"store_url {url} cannot be used: {_line(error)}") from None
        self._signs = not local

    def put(self, key: str, data: bytes) -> None:
        """Write an object, in place of any that is there."""
        with _errors():
            obstore.put(self._quick, key, data, use_multipart=False)

    def create(self, key: str, data: bytes) -> bool:
        """Write an object where there is none; False where there is one."""
        with _errors():
            try:
                obstore.put(self._quick, key, data, mode="create")
            except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
                return False
        return True

    def get(self, key: str) -> bytes | None:
        """An object's bytes; None where there is none."""
        with _errors():
            try:
                return bytes(obstore.get(self._quick, key).bytes())
            except FileNotFoundError:
                return None

    def has(self, key: str) -> bool:
        """Whether an object is there."""
        with _errors():
            try:
                obstore.head(self._quick, key)
            except FileNotFoundError:
                return False
        return True

    def upload(self, key: str) -> Upload:
        """Begin to write an object of any length, with at most `PARTS` + 1 parts in memory."""
        with _errors():
            writer = obstore.open_writer(
                self._slow, key, buffer_size=PART_BYTES, max_concurrency=PARTS
            )
        return Upload(writer)

    def read(self, key: str, size_bytes: int) -> Iterator[bytes]:
        """An object's bytes in pieces; where few are read, the next part is fetched while one is
        used.

        Whoever stops before the end does not wait for what is coming.

        Raises:
            DataLoss: It is not there, or ends earlier (CHECKPOINT_CORRUPT).
        """
        if size_bytes <= PIECE_BYTES or not self._ahead.acquire(blocking=False):
            for start in range(0, size_bytes, PIECE_BYTES):
                yield self._part(key, start, size_bytes, PIECE_BYTES)
            return
        try:
            yield from self._read_ahead(key, size_bytes)
        finally:
            self._ahead.release()

    def _read_ahead(self, key: str, size_bytes: int) -> Iterator[bytes]:
        def fetch(start: int) -> "Future[bytes]":
            return self._readers.submit(self._part, key, start, size_bytes, PART_BYTES)

        coming = fetch(0)
        for start in range(0, size_bytes, PART_BYTES):
            part = coming.result()
            if start + PART_BYTES < size_bytes:
                coming = fetch(start + PART_BYTES)
            for at in range(0, len(part), PIECE_BYTES):
                yield part[at : at + PIECE_BYTES]

    def _part(self, key: str, start: int, size_bytes: int, part_bytes: int) -> bytes:
        length = min(part_bytes, size_bytes - start)
        with _errors():
            try:
                data = bytes(obstore.get_range(self._slow, key, start=start, length=length))
            except FileNotFoundError:
                message = f"object {key} is not in the store"
                raise DataLoss(message, Reason.CHECKPOINT_CORRUPT) from None
        if len(data) != length:
            message = f"object {key} has {start + len(data)} bytes, not {size_bytes}"
            raise DataLoss(message, Reason.CHECKPOINT_CORRUPT)
        return data

    def pages(self, prefix: str, after: str = "") -> Iterator[list[Object]]:
        """All objects below a prefix, `PAGE` at a time.

        Args:
            prefix: It.
            after: Of these only those whose key sorts behind this one; empty: all.
        """
        with _errors():
            pages = iter(obstore.list(self._quick, prefix, offset=after or None, chunk_size=PAGE))
        while True:
            with _errors():
                page = next(pages, None)
            if not page:
                return
            yield [Object(found["path"], found["size"], found["last_modified"]) for found in page]

    def delete(self, keys: Collection[str]) -> None:
        """Remove objects; one that is not there is no error."""
        with _errors():
            try:
                obstore.delete(self._quick, list(keys))
            except FileNotFoundError:
                for key in keys:
                    with contextlib.suppress(FileNotFoundError):
                        obstore.delete(self._quick, key)

    def url(self, key: str, seconds: float) -> str:
        """An address from which anybody can read an object for a while; empty: there is none."""
        if not self._signs:
            return ""
        with _errors():
            return str(obstore.sign(self._quick, "GET", key, timedelta(seconds=seconds)))


def _requests(options: Mapping[str, str], request_s: float, authorities: bytes) -> dict[str, Any]:
    """How requests are made: how long one is waited for, and whom it trusts; without TLS only where
    whoever sets the store up says http."""
    plain = any(value.startswith("http://") for value in options.values())
    return {
        "client_options": {
            "timeout": timedelta(seconds=request_s),
            "connect_timeout": timedelta(seconds=CONNECT_S),
            **({"root_certificate": authorities} if authorities else {}),
            "allow_http": plain or os.environ.get("AWS_ALLOW_HTTP", "").lower() == "true",
        },
        "retry_config": {
            "max_retries": RETRIES,
            "retry_timeout": timedelta(seconds=RETRIES_S),
        },
    }


def _check(url: str) -> None:
    scheme, separator, rest = url.partition("://")
    host = rest.partition("/")[0]
    known = scheme in SCHEMES or (scheme == "https" and host.endswith(_HOSTS))
    if not separator or not known:
        raise StoreUnusable(f"store_url {url!r} is none of s3://, gs://, az://, file://")


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Translate what obstore raises."""
    try:
        yield
    except exceptions.BaseError as error:
        raise _of(error) from None
    except OSError as error:
        # What a store says of an upload comes as one without a number.
        if error.errno is None:
            raise _of(error) from None
        raise of_disk(error) from error


def _of(error: Exception) -> TinsmithError:
    if any(sign in str(error) for sign in _FULL):
        return of_disk(OSError(errno.ENOSPC, ""))
    failure = Unavailable(
        "the object store of checkpoints fails",
        Reason.CHECKPOINT_UNAVAILABLE,
        retry_after_s=RETRY_UNAVAILABLE_S,
    )
    failure.add_note(_line(error))
    return failure


def _line(error: BaseException) -> str:
    """The first line of an error, without the signature of a URL."""
    (first, *_) = str(error).splitlines() or [type(error).__name__]
    return re.sub(r"\?\S+", "?…", first)[:_WORDS]
