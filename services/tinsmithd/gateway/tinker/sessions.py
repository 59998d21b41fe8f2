"""Sessions: names under which a program's models and samplers stand.

A gateway keeps no session: its id is all that it needs, so a heartbeat may go to any gateway,
before and after a restart.
"""

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tinsmithd.gateway.tinker.ids import check_session_id, new_session_id
from tinsmithd.gateway.tinker.room import Room, text_of, texts_of


def routes(room: Room) -> Sequence[BaseRoute]:
    """Routes of this module."""

    async def create_session(request: Request) -> Response:
        body = await room.bodies.json(request)
        texts_of(body, "user_metadata")
        session_id = new_session_id()
        room.held.heard(session_id)
        return JSONResponse({"session_id": session_id, "type": "create_session"})

    async def session_heartbeat(request: Request) -> Response:
        body = await room.bodies.json(request)
        room.held.heard(check_session_id(text_of(body, "session_id")))
        return JSONResponse({"type": "session_heartbeat"})

    async def finish(request: Request) -> Response:
        await room.bodies.json(request)
        room.held.end(check_session_id(request.path_params["session_id"]))
        return JSONResponse({})

    return [
        Route("/create_session", create_session, methods=["POST"]),
        Route("/session_heartbeat", session_heartbeat, methods=["POST"]),
        Route("/sessions/{session_id}/finish", finish, methods=["POST"]),
    ]
