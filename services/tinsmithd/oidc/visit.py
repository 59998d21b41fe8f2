"""One look at an issuer: its configuration and its keys, read over HTTP.

Nobody is called but who stands in the settings: no redirect is followed, and keys that the
configuration says are on another host are not fetched. Nothing in a token says where to look.
"""

import contextlib
import http.client
import json
import socket
import ssl
from typing import Any
from urllib.parse import SplitResult, urlsplit

from tinsmithd.config import CalledConfig
from tinsmithd.oidc.published import PublishedKeys
from tinsmithd.text import bounded

CONFIGURATION = "/.well-known/openid-configuration"
PAGE_BYTES_MAX = 512 * 1024
TEXT_BYTES_MAX = 200


class IssuerError(Exception):
    """The issuer did not answer, or said what cannot be used; the message is for an operator."""


class Visit:
    """Reads an issuer's keys; blocks, and is for a thread of its own.

    Args:
        settings: Which issuer, and how.
    """

    def __init__(self, settings: CalledConfig) -> None:
        self._settings = settings
        self._connection: http.client.HTTPConnection | None = None
        self._socket: socket.socket | None = None
        self._is_over = False

    def keys(self) -> PublishedKeys:
        """The keys that it publishes and that tokens may be signed with.

        Raises:
            IssuerError: There are none to be had.
        """
        page = self._get(self._settings.oidc_jwks_url or self._keys_url())
        found = page.get("keys")
        if not isinstance(found, list):
            raise IssuerError("what it gives for its keys has no list of them")
        keys = PublishedKeys(found, self._settings.algorithms)
        if not len(keys):
            raise IssuerError("it publishes no key that tokens may be signed with here")
        return keys

    def end(self) -> None:
        """End it from another thread: whatever it waits for breaks."""
        self._is_over = True
        connection = self._connection
        # The connection lets go of its socket while an answer that ends with it is being read.
        taken = self._socket if connection is None else connection.sock or self._socket
        if taken is not None:
            with contextlib.suppress(OSError):
                taken.shutdown(socket.SHUT_RDWR)

    def _keys_url(self) -> str:
        issuer = self._settings.oidc_issuer
        page = self._get(issuer.rstrip("/") + CONFIGURATION)
        if page.get("issuer") != issuer:
            said = bounded(str(page.get("issuer")), TEXT_BYTES_MAX)
            raise IssuerError(f"it calls itself {said}, and oidc_issuer is {issuer}")
        url = page.get("jwks_uri")
        try:
            parts = urlsplit(url) if isinstance(url, str) else None
            if parts is None or _origin(parts) != _origin(urlsplit(issuer)):
                raise ValueError
        except ValueError:
            said = bounded(str(url), TEXT_BYTES_MAX)
            raise IssuerError(f"its keys are at {said}: oidc_jwks_url has to say that") from None
        return parts.geturl()

    def _get(self, url: str) -> dict[str, Any]:
        try:
            data = self._read(urlsplit(url))
            page = json.loads(data)
        except (OSError, http.client.HTTPException) as error:
            text = str(error) or type(error).__name__
            raise IssuerError(f"{url}: {bounded(text, TEXT_BYTES_MAX)}") from error
        except (ValueError, RecursionError) as error:
            raise IssuerError(f"{url}: is no JSON") from error
        if not isinstance(page, dict):
            raise IssuerError(f"{url}: is no JSON object")
        return page

    def _read(self, url: SplitResult) -> bytes:
        host, port = url.hostname or "", url.port
        timeout_s = self._settings.oidc_timeout_s
        if url.scheme == "https":
            ca_file = self._settings.oidc_ca_file or None
            trusted = ssl.create_default_context(cafile=ca_file)
            made: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, port, timeout=timeout_s, context=trusted
            )
        else:
            made = http.client.HTTPConnection(host, port, timeout=timeout_s)
        self._connection = made
        try:
            if self._is_over:
                raise IssuerError("it took too long")
            made.connect()
            self._socket = made.sock
            target = (url.path or "/") + (f"?{url.query}" if url.query else "")
            made.request("GET", target, headers={"Accept": "application/json"})
            answer = made.getresponse()
            if answer.status != http.client.OK:
                raise IssuerError(f"{url.geturl()}: answers {answer.status}")
            data = answer.read(PAGE_BYTES_MAX + 1)
        finally:
            made.close()
        if len(data) > PAGE_BYTES_MAX:
            raise IssuerError(f"{url.geturl()}: has more than {PAGE_BYTES_MAX} bytes")
        return data


def _origin(url: SplitResult) -> tuple[str, str | None, int | None]:
    usual = {"https": 443, "http": 80}.get(url.scheme)
    return url.scheme, url.hostname, url.port or usual
