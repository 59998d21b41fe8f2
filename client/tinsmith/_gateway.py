"""Asks the gateway for what it alone gives: URLs that may be read without a key.

The rest of this client speaks gRPC; the gateway speaks HTTP. `TINSMITH_HTTP_URL` says where it
is, or the cluster does.
"""

import asyncio
import json
import os
import ssl
from collections.abc import Mapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

from tinsmith import _check
from tinsmith._connection import Connection
from tinsmith.addresses import GATEWAY_VARIABLE
from tinsmith.channels import TlsFiles
from tinsmith.errors import (
    APIStatusError,
    AuthenticationError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    TinsmithError,
    UnavailableError,
    unsupported,
)
from tinsmith.keys import Metadata

TIMEOUT_S = 30.0
ANSWER_BYTES_MAX = 4 * 1024 * 1024
RETRY_S = 1.0
_GOOD = (200, 302)
_CLASSES: Mapping[int, type[APIStatusError]] = {
    400: InvalidArgumentError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    429: ResourceExhaustedError,
}


async def ask(connection: Connection, what: str, path: str) -> Mapping[str, Any]:
    """The JSON that the gateway answers to a GET; waits for one that is away.

    Args:
        connection: To the cluster that it stands before.
        what: The method that needs it.
        path: From `/api/v1/` on.

    Raises:
        UnimplementedError: Nobody says where one is.
        TinsmithError: The answer, where it is a refusal.
    """
    given = os.environ.get(GATEWAY_VARIABLE, "")
    where = GATEWAY_VARIABLE if given else "gateway_url"
    url = given or (await connection.told()).gateway_url
    if not url:
        why = "the cluster names no gateway, which gives URLs"
        raise unsupported(what, f"{why}: set {GATEWAY_VARIABLE}, or use download_checkpoint")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise _check.refuse(where, f"{_check.shown(url)} is not http://host:port or https://host")

    async def attempt() -> Mapping[str, Any]:
        return await asyncio.to_thread(_get, parts, path, connection.shown, connection.files)

    return await connection.retrying(what, attempt, service="gateway")


def _get(parts: SplitResult, path: str, shown: Metadata, files: TlsFiles) -> Mapping[str, Any]:
    import http.client  # which nobody else needs

    host, port = parts.hostname or "", parts.port
    made: http.client.HTTPConnection
    if parts.scheme == "https":
        context = ssl.create_default_context(cafile=files.ca or None)
        if files.certificate:
            context.load_cert_chain(files.certificate, files.key)
        made = http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=context)
    else:
        made = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    headers = {"Accept": "application/json", **{name: str(value) for name, value in shown}}
    try:
        made.request("GET", f"{parts.path.rstrip('/')}{path}", headers=headers)
        response = made.getresponse()
        body = response.read(ANSWER_BYTES_MAX)
    except (OSError, http.client.HTTPException) as error:
        message = f"the gateway at {parts.netloc} does not answer: {error}"
        raise UnavailableError(message) from None
    finally:
        made.close()
    try:
        found = json.loads(body)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        found = {"detail": f"the gateway at {parts.netloc} answered {response.status}"}
    if response.status in _GOOD and "detail" not in found:
        return found
    raise _error_of(response.status, found)


def _error_of(status: int, said: Mapping[str, Any]) -> TinsmithError:
    message, reason = str(said.get("detail", "")), str(said.get("reason", ""))
    if status >= 500:
        return UnavailableError(message, reason=reason, retry_after_s=RETRY_S)
    field, retry_after_s = str(said.get("field", "")), RETRY_S if status == 429 else None
    made = _CLASSES.get(status, InternalError)
    return made(message, reason=reason, field=field, retry_after_s=retry_after_s)
