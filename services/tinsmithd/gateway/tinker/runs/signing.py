"""Signs URLs: whoever has one may read one file until it expires, without a key of the service."""

import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from urllib.parse import urlencode

from starlette.requests import Request

from tinsmithd.config import GatewaySettings
from tinsmithd.gateway.problems import Problem

_FORM = "tinsmith file 1"


def public_base(request: Request, settings: GatewaySettings) -> str:
    """What URLs of this gateway begin with, for whoever makes a request."""
    base = settings.public_url.rstrip("/") or str(request.base_url).rstrip("/")
    # What a proxy cut off before `/api` only `public_url` knows.
    return base.removesuffix("/api/v1")


class Signer:
    """Makes and checks signatures.

    Args:
        settings: Has the key; where it is empty, one is drawn, and what it signs ends with this
            process.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        self._key = settings.signing_key.get_secret_value().encode() or secrets.token_bytes(32)
        self._lasts = timedelta(seconds=settings.download_url_s)

    def expiry(self) -> datetime:
        """When a URL that is made now expires; whole seconds."""
        return (datetime.now(UTC) + self._lasts).replace(microsecond=0)

    def query(self, path: str, file: str, digest: bytes, expires: datetime, owner: str = "") -> str:
        """The query of a file's URL.

        Args:
            path: The checkpoint, as the Checkpoint server has it.
            file: The file's name.
            digest: The checkpoint's content.
            expires: When it expires.
            owner: Whose the checkpoint is; empty where there are no keys.
        """
        said = {"digest": digest.hex(), "expires": str(int(expires.timestamp()))}
        signature = self._signature(path, file, said["digest"], said["expires"], owner)
        if owner:
            said["owner"] = owner
        return urlencode({**said, "signature": signature})

    def check(self, path: str, file: str, query: Mapping[str, str]) -> tuple[bytes, str]:
        """The content that a URL is for, and its owner.

        Raises:
            Problem: 403, the signature is none of ours, or has expired.
        """
        digest, expires = query.get("digest", ""), query.get("expires", "")
        owner = query.get("owner", "")
        wanted = self._signature(path, file, digest, expires, owner)
        given = query.get("signature", "")
        if not hmac.compare_digest(wanted.encode(), given.encode("utf-8", "replace")):
            raise Problem(403, "this URL was not made here, or was changed since; ask for another")
        if int(expires) < time.time():
            raise Problem(403, "this URL has expired; ask for another one")
        return bytes.fromhex(digest), owner

    def _signature(self, path: str, file: str, digest: str, expires: str, owner: str) -> str:
        parts = (_FORM, path, file, digest, expires, *([owner] if owner else []))
        text = "\n".join(parts)
        return hmac.new(self._key, text.encode("utf-8", "replace"), hashlib.sha256).hexdigest()
