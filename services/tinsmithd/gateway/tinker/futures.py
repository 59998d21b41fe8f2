"""`retrieve_future`: waits for the result of a promise; pushed, not polled."""

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tinsmithd.gateway.tinker.room import Room, text_of


def routes(room: Room) -> Sequence[BaseRoute]:
    """Routes of this module."""

    async def retrieve_future(request: Request) -> Response:
        body = await room.bodies.json(request)
        request_id = text_of(body, "request_id")
        answer = await room.promises.wait(request_id, room.settings.poll_s_max)
        if answer is None:
            again = {"type": "try_again", "request_id": request_id, "queue_state": "active"}
            return JSONResponse(again, 408)
        return Response(answer.body, media_type=answer.media_type)

    return [Route("/retrieve_future", retrieve_future, methods=["POST"])]
