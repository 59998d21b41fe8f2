"""What the parts of the SDK's room share, and how they read requests."""

import asyncio
from collections.abc import Mapping
from typing import Any

from tinsmithd.config import GatewaySettings
from tinsmithd.gateway.bodies import Bodies
from tinsmithd.gateway.callers import part
from tinsmithd.gateway.cluster import Cluster
from tinsmithd.gateway.metrics import Held
from tinsmithd.gateway.names import BaseModelNames
from tinsmithd.gateway.problems import Problem
from tinsmithd.gateway.tinker.held import HeldSamplers
from tinsmithd.gateway.tinker.order import Order
from tinsmithd.gateway.tinker.promises import Promises

INT64_MAX = 2**63 - 1


class Room:
    """Shared by all routes of the SDK.

    Args:
        cluster: What stands behind.
        settings: The limits.
        stopping: Set when the process is about to end.

    Attributes:
        bodies: Reads bodies.
        names: Those of base models.
        promises: Results that are waited for.
    """

    def __init__(
        self, cluster: Cluster, settings: GatewaySettings, stopping: asyncio.Event
    ) -> None:
        self.cluster = cluster
        self.settings = settings
        self.stopping = stopping
        self.bodies = Bodies(settings)
        self.names = BaseModelNames(settings.base_models, settings.tokenizer_ids)
        self.promises = Promises(settings, stopping)
        # Apart for each key: what one caller has here is nothing to another, and what goes on
        # after a request goes on with its key.
        self._held: dict[str, HeldSamplers] = {}
        self._orders: dict[str, Order] = {}

    def counts(self) -> Held:
        """What is in memory now; another thread may ask."""
        under_way, kept_bytes = self.promises.counts()
        sessions = sum(held.sessions_count for held in list(self._held.values()))
        return Held(under_way, self.settings.results_under_way_max, kept_bytes, sessions)

    @property
    def held(self) -> HeldSamplers:
        """Samplers without a name that are held for sessions of the caller."""
        if part() not in self._held:
            self._held[part()] = HeldSamplers(self.cluster, self.settings)
        return self._held[part()]

    @property
    def order(self) -> Order:
        """Gets numbered calls of the caller through."""
        if part() not in self._orders:
            self._orders[part()] = Order(self.cluster)
        return self._orders[part()]


def text_of(body: Mapping[str, Any], key: str, default: str | None = None) -> str:
    """A text in a body; without `default` it has to be there, and not empty.

    Raises:
        Problem: 400, naming the field.
    """
    value = body.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, str) or (default is None and not value):
        raise Problem(400, f"{key}: must be a text", field=key)
    return value


def int_of(
    body: Mapping[str, Any],
    key: str,
    default: int | None = None,
    *,
    least: int = 0,
    most: int = INT64_MAX,
) -> int:
    """A whole number in a body; without `default` it has to be there.

    Raises:
        Problem: 400, naming the field.
    """
    value = body.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        message = f"{key}: must be a whole number from {least} to {most}"
        raise Problem(400, message, field=key)
    return value


def number_of(body: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A number in a body; without `default` it has to be there.

    Raises:
        Problem: 400, naming the field.
    """
    value = body.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise Problem(400, f"{key}: must be a number", field=key)
    try:
        return float(value)
    except OverflowError:
        raise Problem(400, f"{key}: is beyond 64 bits", field=key) from None


def bool_of(body: Mapping[str, Any], key: str, default: bool) -> bool:
    """True or false in a body.

    Raises:
        Problem: 400, naming the field.
    """
    value = body.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise Problem(400, f"{key}: must be true or false", field=key)
    return value


def object_of(body: Mapping[str, Any], key: str) -> dict[str, Any]:
    """An object in a body; empty where it is not there.

    Raises:
        Problem: 400, naming the field.
    """
    value = body.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Problem(400, f"{key}: must be an object", field=key)
    return value


def texts_of(body: Mapping[str, Any], key: str) -> dict[str, str]:
    """An object of texts in a body, such as `user_metadata`; empty where it is not there.

    Raises:
        Problem: 400, naming the field.
    """
    found = object_of(body, key)
    for name, value in found.items():
        if not isinstance(value, str):
            raise Problem(400, f"{key}: the value of {name[:40]!r} must be a text", field=key)
    return found
