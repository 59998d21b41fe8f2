"""What a program hears before it makes a session: flags, capabilities; and telemetry, which nobody
keeps."""

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tinsmithd.gateway.callers import is_here
from tinsmithd.gateway.tinker.room import Room

FLAGS = {
    # Chunks of a call come in the order of their numbers, so each is written down before its
    # promise is given: one whose predecessor has not come yet is only held in memory.
    "parallel_fwdbwd_chunks": False,
    "proto_write_fwdbwd": True,  # of 0.22: newer ones have nothing else, older ones send JSON
    "fwdbwd_max_chunk_len": 1024,
    "fwdbwd_max_chunk_bytes_count": 5_000_000,
    "pjwt_auth_enabled": False,
    "custom_loss_server_side": False,
}


def flags_for(scope: Any) -> Mapping[str, object]:
    """The flags of one caller.

    Bodies are packed on their way over a network. On one machine that takes longer than it saves:
    the SDK packs on another thread, and makes all that it needs for that anew each time.

    Args:
        scope: Of the request, as ASGI has it.
    """
    return {**FLAGS, "proto_compress_fwdbwd": not is_here(scope)}


def routes(room: Room) -> Sequence[BaseRoute]:
    """Routes of this module."""

    async def client_config(request: Request) -> Response:
        await room.bodies.json(request)
        return JSONResponse(flags_for(request.scope))

    async def dynamic_config(request: Request) -> Response:
        await room.bodies.json(request)
        return JSONResponse({"sample_cancel_enabled": True})

    async def telemetry(request: Request) -> Response:
        async with room.bodies.read(request):
            return JSONResponse({"status": "accepted"})

    async def capabilities(request: Request) -> Response:
        found = await room.cluster.capabilities()
        models = [
            {
                "model_name": name,
                "max_context_length": each.context_length,
                "trainable": True,
                "sampleable": True,
            }
            for each in found.base_models
            for name in room.names.all([each.name])
        ]
        return JSONResponse({"supported_models": models})

    async def healthz(request: Request) -> Response:
        await room.cluster.capabilities()
        return JSONResponse({"status": "ok"})

    return [
        Route("/client/config", client_config, methods=["POST"]),
        Route("/client/dynamic_config", dynamic_config, methods=["POST"]),
        Route("/telemetry", telemetry, methods=["POST"]),
        Route("/get_server_capabilities", capabilities),
        Route("/healthz", healthz),
    ]
