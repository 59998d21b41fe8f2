"""A search of sessions: what is asked, and what is found."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from tinsmith.types._values import Response, Value

LIMIT_MAX = 200


@dataclass(frozen=True, eq=False, kw_only=True)
class OwnSearchOwner(Value):
    """The caller's own sessions."""

    type: Literal["own"] = "own"


@dataclass(frozen=True, eq=False, kw_only=True)
class AccessibleSearchOwner(Value):
    """All sessions that the caller sees."""

    type: Literal["accessible"] = "accessible"


SearchOwner = OwnSearchOwner | AccessibleSearchOwner


@dataclass(frozen=True, eq=False, kw_only=True)
class SessionSearchCursor(Value):
    """Where the next page begins."""

    last_created_at: datetime
    last_session_id: str


@dataclass(frozen=True, eq=False, kw_only=True)
class SessionSearchRequest(Value):
    """Which sessions. They have no display name, no project but "default", and no status here.

    Attributes:
        session_id: The one of this id; None: any.
        user_metadata: Those whose models have all of these entries.
        owner: Ignored: those are found that the caller sees.
        limit: Most of a page, 1 to 200.
        cursor: `next_cursor` of the page before.
    """

    session_id: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = field(default_factory=dict)
    display_name: str | None = None
    owner: SearchOwner = field(default_factory=OwnSearchOwner)
    statuses: list[dict[str, str]] | None = None
    limit: int = 50
    cursor: SessionSearchCursor | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class SessionSummary(Response):
    """A session; `created_at` is the creation of its first model that is there."""

    session_id: str
    created_at: datetime
    owner: str
    project_id: str
    checkpoints_count: int
    status: dict[str, str] | None = None
    display_name: str | None = None
    user_metadata: dict[str, str] | None = None
    checkpoint_storage_bytes: int | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class SessionSearchResponse(Response):
    """A page of sessions, newest first."""

    sessions: list[SessionSummary]
    next_cursor: SessionSearchCursor | None = None
