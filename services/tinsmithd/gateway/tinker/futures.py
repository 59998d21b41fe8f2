"""`retrieve_future`: waits for the result of a promise; pushed, not polled."""

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tinsmithd.gateway.tinker.pieces import answer_of
from tinsmithd.gateway.tinker.room import Room, bool_of, text_of

INLINE_BYTES_MAX = 256 * 1024
"""A larger result is announced first where the SDK takes that: it has a budget of bytes."""


def routes(room: Room) -> Sequence[BaseRoute]:
    """Routes of this module."""

    async def retrieve_future(request: Request) -> Response:
        body = await room.bodies.json(request)
        request_id = text_of(body, "request_id")
        answer = await room.promises.wait(request_id, room.settings.poll_s_max)
        if answer is None:
            again = {"type": "try_again", "request_id": request_id}
            return JSONResponse({**again, **room.promises.queue_state(request_id)}, 408)
        if "protobuf" not in request.headers.get("accept", ""):
            answer = room.promises.plain(request_id, answer)
        size = len(answer.body)
        if size > INLINE_BYTES_MAX and bool_of(body, "allow_metadata_only", False):
            return JSONResponse({"status": "complete_metadata", "response_payload_size": size})
        return answer_of(answer.body, answer.media_type)

    return [Route("/retrieve_future", retrieve_future, methods=["POST"])]
