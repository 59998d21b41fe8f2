"""Sessions, as far as runs tell of them: a gateway keeps none.

A session is known by the runs that were made in it, and by its heartbeats here. Its display name,
metadata and project are not kept.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tinsmithd.gateway.problems import Problem
from tinsmithd.gateway.tinker.ids import check_session_id, session_of_model
from tinsmithd.gateway.tinker.room import Room, int_of, object_of, text_of
from tinsmithd.gateway.tinker.runs.catalogue import Catalogue, Run
from tinsmithd.gateway.tinker.runs.lists import PROJECT, check_project, page_of

SEARCH_LIMIT_MAX = 200


def routes(room: Room, catalogue: Catalogue) -> Sequence[BaseRoute]:
    """Routes of this module."""

    async def listed(request: Request) -> Response:
        offset, limit = page_of(request, 20)
        found = list(await _sessions(catalogue, room))
        return JSONResponse({"sessions": found[offset : offset + limit]})

    async def one(request: Request) -> Response:
        session_id = check_session_id(request.path_params["session_id"])
        runs = (await _sessions(catalogue, room)).get(session_id)
        if runs is None:
            raise Problem(404, "session_id: there is no such session", "", "session_id")
        return JSONResponse({"training_run_ids": [run.run_id for run in runs], "sampler_ids": []})

    async def search(request: Request) -> Response:
        body = await room.bodies.json(request)
        for name in ("project_ids", "user_metadata", "display_name"):
            if body.get(name):
                message = f"{name}: sessions do not keep it here; search by session_id or statuses"
                raise Problem(400, message, "INVALID_FIELD", name)
        limit = int_of(body, "limit", 50, least=1, most=SEARCH_LIMIT_MAX)
        wanted = text_of(body, "session_id", "")
        found = [
            _summary(session_id, runs, room)
            for session_id, runs in (await _sessions(catalogue, room)).items()
            if wanted in ("", session_id)
        ]
        found = [each for each in found if _has_status(body, each)]
        found.sort(key=_place, reverse=True)
        if body.get("cursor") is not None:
            after = _cursor(body)
            found = [each for each in found if _place(each) < after]
        page = found[:limit]
        answer: dict[str, Any] = {"sessions": page}
        if len(found) > limit:
            last = page[-1]
            answer["next_cursor"] = {
                "last_created_at": last["created_at"],
                "last_session_id": last["session_id"],
            }
        return JSONResponse(answer)

    async def project(request: Request) -> Response:
        body = await room.bodies.json(request)
        check_session_id(request.path_params["session_id"])
        check_project(text_of(body, "project_id"))  # it is there already
        return JSONResponse({})

    return [
        Route("/sessions", listed),
        Route("/sessions/{session_id}/project", project, methods=["PUT"]),
        Route("/sessions/search", search, methods=["POST"]),
        Route("/sessions/{session_id}", one),
    ]


async def _sessions(catalogue: Catalogue, room: Room) -> Mapping[str, Sequence[Run]]:
    """Sessions with their runs, those with the newest run first, then those without any."""
    found: dict[str, list[Run]] = {}
    for run in await catalogue.runs():
        session_id = session_of_model(run.run_id)
        if session_id:
            found.setdefault(session_id, []).append(run)
    for session_id in room.held.sessions():
        found.setdefault(session_id, [])
    return found


def _summary(session_id: str, runs: Sequence[Run], room: Room) -> Mapping[str, Any]:
    checkpoints = [each for run in runs for each in run.checkpoints]
    made = [run.model.create_time for run in runs if run.model is not None]
    made += [each.create_time for each in checkpoints]
    begun = [stamp.ToDatetime(UTC) for stamp in made]
    alive = session_id in room.held.sessions()
    return {
        "session_id": session_id,
        "created_at": min(begun, default=datetime.fromtimestamp(0, UTC)).isoformat(),
        "owner": next((r.model.owner for r in runs if r.model is not None), "default"),
        "project_id": PROJECT,
        "status": {"type": "active"} if alive else None,
        "checkpoints_count": len(checkpoints),
        "checkpoint_storage_bytes": sum(each.size_bytes for each in checkpoints),
    }


def _has_status(body: Mapping[str, Any], summary: Mapping[str, Any]) -> bool:
    statuses = body.get("statuses")
    if statuses is None:
        return True
    if not isinstance(statuses, list) or not all(isinstance(each, dict) for each in statuses):
        raise Problem(400, "statuses: expected a list of objects", "INVALID_FIELD", "statuses")
    return summary["status"] in [{"type": each.get("type")} for each in statuses]


def _cursor(body: Mapping[str, Any]) -> tuple[datetime, str]:
    cursor = object_of(body, "cursor")
    try:
        when = datetime.fromisoformat(text_of(cursor, "last_created_at"))
        return when.astimezone(UTC), text_of(cursor, "last_session_id")
    except (ValueError, OverflowError, Problem):
        message = "cursor: expected what the answer before had"
        raise Problem(400, message, "INVALID_FIELD", "cursor") from None


def _place(summary: Mapping[str, Any]) -> tuple[datetime, str]:
    return datetime.fromisoformat(summary["created_at"]), summary["session_id"]
