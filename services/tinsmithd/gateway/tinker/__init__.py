"""What the stock Tinker SDK asks for, from 0.18 to 0.38.

Each module has a `routes(room)` of its own; `routes` here puts them together. Paths are the SDK's,
below `/api/v1`.
"""

import asyncio
from collections.abc import Sequence

from starlette.routing import BaseRoute, Mount

from tinsmithd.config import GatewaySettings
from tinsmithd.gateway.cluster import Cluster
from tinsmithd.gateway.metrics import HttpMetrics
from tinsmithd.gateway.tinker import config, futures, refused, runs, samples, sessions, training
from tinsmithd.gateway.tinker.room import Room


def routes(
    cluster: Cluster, settings: GatewaySettings, stopping: asyncio.Event, metrics: HttpMetrics
) -> Sequence[BaseRoute]:
    """All routes of the SDK."""
    room = Room(cluster, settings, stopping)
    metrics.held = room.counts
    # They are looked through in this order: what each step asks for comes first.
    parts = (futures, training, samples, sessions, config, runs, refused)
    return [Mount("/api/v1", routes=[route for part in parts for route in part.routes(room)])]
