"""What `GetCapabilities` says of any server: its version and its limits, by their names.

A limit has one name: that of the setting or constant which is enforced. But a span of time is a
`Duration` on the wire, and its name has no unit there (`gap_wait_s_max` is `gap_wait_max`). A limit
of tenants is that of the caller's.
"""

import functools
import importlib.metadata
from collections.abc import Mapping
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from tinsmithd import keys
from tinsmithd.convert.times import TTL_S_MAX, duration_to_pb
from tinsmithd.convert.types import (
    LEASE_ID_CHARACTERS_MAX,
    METADATA_ENTRIES_MAX,
    METADATA_KEY_CHARACTERS_MAX,
    METADATA_VALUE_CHARACTERS_MAX,
    REQUEST_ID_CHARACTERS_MAX,
)

Limits = TypeVar("Limits", bound=Message)

SHARED: Mapping[str, float] = {
    "request_id_characters_max": REQUEST_ID_CHARACTERS_MAX,
    "user_metadata_entries_max": METADATA_ENTRIES_MAX,
    "user_metadata_key_characters_max": METADATA_KEY_CHARACTERS_MAX,
    "user_metadata_value_characters_max": METADATA_VALUE_CHARACTERS_MAX,
    "lease_id_characters_max": LEASE_ID_CHARACTERS_MAX,
    "ttl_s_max": TTL_S_MAX,
}
"""Limits of every service that are no settings."""


@functools.cache
def server_version() -> str:
    """Version of this server; it is read once, which takes some milliseconds."""
    return importlib.metadata.version("tinsmith")


def limits_to_pb(kind: type[Limits], config: object, **others: float) -> Limits:
    """Write every limit of a service.

    Args:
        kind: Its `...Limits` message; each of its fields is filled in.
        config: Settings, which have most of them.
        others: The rest, by the names that refusals show.
    """
    limits = kind()
    for field in kind.DESCRIPTOR.fields:
        if field.message_type is None:
            setattr(limits, field.name, _value(field.name, config, others))
        else:
            assert field.message_type.full_name == Duration.DESCRIPTOR.full_name
            seconds = _value(setting_of(field.name), config, others)
            getattr(limits, field.name).CopyFrom(duration_to_pb(seconds))
    return limits


def setting_of(limit: str) -> str:
    """The setting of a limit that is a span of time: the same name with its unit."""
    stem = limit.removesuffix("_max")
    return f"{stem}_s{limit.removeprefix(stem)}"


def _value(name: str, config: object, others: Mapping[str, float]) -> Any:
    for values in (others, SHARED):
        if name in values:
            return values[name]
    value = getattr(config, name)
    return keys.current().limit(name, value) if name in keys.LIMIT_NAMES else value
