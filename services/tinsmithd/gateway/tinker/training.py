"""Routes of training: models, calls with data, and calls without."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tinsmith.gateway.v1 import tinker_pb2
from tinsmithd.gateway.bodies import json_object
from tinsmithd.gateway.cluster import ComputeRequest
from tinsmithd.gateway.problems import Problem
from tinsmithd.gateway.tinker import json_data
from tinsmithd.gateway.tinker.data import requests_of
from tinsmithd.gateway.tinker.models import Models, creation_of, loaded_creation_of
from tinsmithd.gateway.tinker.passes import Passes
from tinsmithd.gateway.tinker.room import Room, text_of
from tinsmithd.gateway.tinker.steps import Steps
from tinsmithd.rpc.intake import Intake, refusal_of_call

T = TypeVar("T")

INLINE_BYTES = 256 * 1024
"""What is made of a body that is no larger takes some milliseconds."""


def routes(room: Room) -> Sequence[BaseRoute]:
    """Routes of this module."""
    models, steps = Models(room), Steps(room)

    async def create_model(request: Request) -> Response:
        return await models.start(creation_of(await room.bodies.json(request)))

    async def get_info(request: Request) -> Response:
        body = await room.bodies.json(request)
        return JSONResponse(await models.info(text_of(body, "model_id")))

    async def unload_model(request: Request) -> Response:
        return await models.unload(text_of(await room.bodies.json(request), "model_id"))

    async def load_weights(request: Request) -> Response:
        body = await room.bodies.json(request)
        if body.get("session_id") is not None:
            return await models.start(loaded_creation_of(body))
        return steps.start("load", body)

    def step(kind: str) -> Callable[[Request], Awaitable[Response]]:
        async def call(request: Request) -> Response:
            return steps.start(kind, await room.bodies.json(request))

        return call

    return [
        Route("/create_model", create_model, methods=["POST"]),
        Route("/get_info", get_info, methods=["POST"]),
        Route("/unload_model", unload_model, methods=["POST"]),
        *_pass_routes(room),
        Route("/optim_step", step("step"), methods=["POST"]),
        Route("/save_weights", step("save"), methods=["POST"]),
        Route("/save_weights_for_sampler", step("sampler"), methods=["POST"]),
        Route("/save_weights_external", step("external"), methods=["POST"]),
        Route("/load_weights", load_weights, methods=["POST"]),
    ]


def _pass_routes(room: Room) -> Sequence[BaseRoute]:
    """Routes of calls with data, in protobuf and in JSON."""
    passes = Passes(room)
    settings = room.settings
    intake = Intake(
        tinker_pb2.ForwardBackwardRequest,
        settings.body_bytes_max,
        settings.body_items_max,
        items_limit="body_items_max",
    )

    async def forward_backward(request: Request) -> Response:
        if "json" in request.headers.get("content-type", ""):
            return await in_json(request, "forward_backward_input")
        async with room.bodies.read(request) as body:
            call: Any = await intake.request(body)
            if (refusal := refusal_of_call()) is not None:
                if call.model_id and call.seq_id > 0:
                    room.order.use_up_soon(call.model_id, call.seq_id)
                raise refusal
            if not call.model_id or call.seq_id < 1:
                field = "seq_id" if call.model_id else "model_id"
                raise Problem(400, f"{field}: must be set", field=field)
            return await sent(call.model_id, call.seq_id, len(body), lambda: requests_of(call))

    async def forward(request: Request) -> Response:
        return await in_json(request, "forward_input")

    async def in_json(request: Request, part: str) -> Response:
        async with room.bodies.read(request) as packed:
            most = settings.body_items_max
            body = await off_loop(len(packed), lambda: json_object(packed, most))
            model_id, seq_id = json_data.header_of(body)
            return await sent(
                *(model_id, seq_id, len(packed)),
                lambda: requests_of(json_data.message_of(body, part)),
            )

    async def off_loop(nbytes: int, make: Callable[[], T]) -> T:
        return make() if nbytes <= INLINE_BYTES else await asyncio.to_thread(make)

    async def sent(
        model_id: str, seq_id: int, nbytes: int, make: Callable[[], Sequence[ComputeRequest]]
    ) -> Response:
        try:
            requests = await off_loop(nbytes, make)
        except Problem:
            room.order.use_up_soon(model_id, seq_id)
            raise
        name = await passes.send(model_id, seq_id, requests)
        return JSONResponse({"request_id": name, "model_id": model_id})

    return [
        Route("/forward_backward", forward_backward, methods=["POST"]),
        Route("/forward", forward, methods=["POST"]),
    ]
