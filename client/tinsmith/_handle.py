"""The text that names what a SamplingClient samples from."""

import base64
import json
from collections.abc import Mapping
from typing import Any

from tinsmith._check import refuse
from tinsmith.addresses import checked

VERSION = 1
CHARACTERS_MAX = 16_384


def written(settings: Mapping[str, Any], base_model: str, path: str | None, digest: bytes) -> str:
    """A handle; `settings` as `Connection.settings` has them."""
    content = {
        "version": VERSION,
        "address": settings["address"],
        "give_up_after_s": settings["give_up_after_s"],
        "base_model": base_model,
        "path": path,
        "digest": digest.hex(),
    }
    return base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")


def read(handle: str) -> tuple[Mapping[str, Any], str, str | None, bytes]:
    """What `written` was given.

    Raises:
        InvalidArgumentError: It is no handle.
    """
    try:
        if len(handle) > CHARACTERS_MAX:
            raise ValueError("too long")
        padded = handle + "=" * (-len(handle) % 4)
        content = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
        if content["version"] != VERSION:
            raise ValueError("another version")
        settings = {
            "address": checked(content["address"], "handle"),
            "give_up_after_s": float(content["give_up_after_s"]),
        }
        path = content["path"]
        return settings, str(content["base_model"]), path and str(path), _bytes(content["digest"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise refuse("handle", f"is none of get_sampler_handle ({type(error).__name__})") from None


def _bytes(text: object) -> bytes:
    return bytes.fromhex(str(text))
