"""What a shell is offered when someone presses Tab: names that the cluster has.

An answer that does not come at once, or an error, offers nothing.
"""

from collections.abc import Callable

import typer

from tinsmith.cli.access import Access
from tinsmith.cli.failures import Failed
from tinsmith.errors import TinsmithError
from tinsmith.v1 import checkpoint_service_pb2, training_service_pb2

TIMEOUT_S = 1.0
OFFERED_MAX = 200


def model_ids(context: typer.Context, incomplete: str) -> list[str]:
    """Ids of models that begin like this."""
    request = training_service_pb2.ListModelsRequest(page_size=OFFERED_MAX)
    return _offered(
        context, incomplete, lambda access: [m.model_id for m in access.ask(request).models]
    )


def checkpoint_paths(context: typer.Context, incomplete: str) -> list[str]:
    """Paths of checkpoints that begin like this."""
    request = checkpoint_service_pb2.ListCheckpointsRequest(page_size=OFFERED_MAX)
    return _offered(
        context,
        incomplete,
        lambda access: [c.checkpoint_path for c in access.ask(request).checkpoints],
    )


def _offered(
    context: typer.Context, incomplete: str, names: Callable[[Access], list[str]]
) -> list[str]:
    access = None
    try:
        access = Access(context.params.get("address"), TIMEOUT_S)
        # A shell would run what is not a plain word.
        return [n for n in names(access) if n.startswith(incomplete) and _is_plain(n)]
    except (TinsmithError, Failed):
        return []
    finally:
        if access is not None:
            access.close()


def _is_plain(name: str) -> bool:
    return all(c.isascii() and (c.isalnum() or c in "._:/-") for c in name)
