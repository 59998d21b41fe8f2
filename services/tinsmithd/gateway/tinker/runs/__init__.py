"""Training runs, checkpoints and sessions, as the SDK's RestClient and CLI list and change them."""

from collections.abc import Sequence

from starlette.routing import BaseRoute

from tinsmithd.gateway.tinker.room import Room
from tinsmithd.gateway.tinker.runs import changes, downloads, lists, sessions, traces
from tinsmithd.gateway.tinker.runs.catalogue import Catalogue


def routes(room: Room) -> Sequence[BaseRoute]:
    """Routes of these parts."""
    catalogue = Catalogue(room.cluster)
    parts = (lists, changes, downloads, sessions, traces)
    return [route for part in parts for route in part.routes(room, catalogue)]
