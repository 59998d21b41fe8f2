"""Searches sessions among models and checkpoints: nothing else is kept of one."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from tinsmith import _check
from tinsmith._connection import CHECKPOINT, TRAINING, Connection
from tinsmith.admin_client import PAGE_SIZE, PROJECT
from tinsmith.errors import unsupported
from tinsmith.types.sessions import (
    LIMIT_MAX,
    SessionSearchCursor,
    SessionSearchRequest,
    SessionSearchResponse,
    SessionSummary,
)
from tinsmith.v1 import checkpoint_service_pb2, training_service_pb2

Checkpoint = checkpoint_service_pb2.Checkpoint
Model = training_service_pb2.Model


def checked(request: object) -> SessionSearchRequest:
    """A search that can be made.

    Raises:
        InvalidArgumentError: It is none, or its limit is wrong.
        UnimplementedError: It asks for what sessions do not have.
    """
    asked = SessionSearchRequest.model_validate(request)
    _check.whole(asked.limit, "limit", 1, LIMIT_MAX)
    for name in ("display_name", "statuses"):
        if getattr(asked, name):
            raise unsupported(f"search_sessions: {name}", "sessions have none here")
    if asked.project_ids and PROJECT not in asked.project_ids:
        raise unsupported("search_sessions: project_ids", f"there is one project, {PROJECT!r}")
    return asked


async def search(
    connection: Connection, asked: SessionSearchRequest, session_of: Callable[[str], str | None]
) -> SessionSearchResponse:
    """A page of sessions.

    Args:
        connection: Where.
        asked: The search, checked.
        session_of: The session of a model's id; None where it has none.
    """
    models: dict[str, list[Model]] = {}
    for model in await _pages(connection, "ListModels"):
        if session_id := session_of(model.model_id):
            models.setdefault(session_id, []).append(model)
    sizes: dict[str, list[int]] = {}
    for each in await _pages(connection, "ListCheckpoints"):
        if (session_id := session_of(each.model_id)) and not each.ephemeral:
            sizes.setdefault(session_id, []).append(each.size_bytes)
    wanted = asked.user_metadata.items()
    found = [
        _summary(session_id, several, sizes.get(session_id, []))
        for session_id, several in models.items()
        if asked.session_id in (None, session_id)
        and wanted <= dict(several[-1].user_metadata).items()
    ]
    found.sort(key=_place, reverse=True)
    if asked.cursor is not None:
        after = (asked.cursor.last_created_at, asked.cursor.last_session_id)
        found = [each for each in found if _place(each) < after]
    page, more = found[: asked.limit], len(found) > asked.limit
    cursor = None
    if more:
        last = page[-1]
        cursor = SessionSearchCursor(
            last_created_at=last.created_at, last_session_id=last.session_id
        )
    return SessionSearchResponse(sessions=page, next_cursor=cursor)


def _place(each: SessionSummary) -> tuple[datetime, str]:
    return each.created_at, each.session_id


def _summary(session_id: str, models: Sequence[Model], sizes: Sequence[int]) -> SessionSummary:
    first = models[-1]  # they are listed newest first
    return SessionSummary(
        session_id=session_id,
        created_at=first.create_time.ToDatetime(UTC),
        owner=first.owner,
        project_id=PROJECT,
        checkpoints_count=len(sizes),
        checkpoint_storage_bytes=sum(sizes),
        user_metadata=dict(first.user_metadata),
    )


async def _pages(connection: Connection, method: str) -> Sequence[Any]:
    """All models, or all checkpoints."""
    models = method == "ListModels"
    kind: Any = training_service_pb2.ListModelsRequest
    if not models:
        kind = checkpoint_service_pb2.ListCheckpointsRequest
    found: list[Any] = []
    token = ""
    while True:
        request = kind(page_size=PAGE_SIZE, page_token=token)

        async def attempt(request: Any = request) -> Any:
            stub: Any = connection.training() if models else await connection.checkpoint()
            return await getattr(stub, method)(request)

        service = TRAINING if models else CHECKPOINT
        page = await connection.retrying("search_sessions", attempt, service=service)
        found.extend(page.models if models else page.checkpoints)
        token = page.next_page_token
        if not token:
            return found
