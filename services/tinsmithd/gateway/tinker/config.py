"""What a program hears before it makes a session: flags, capabilities; and telemetry, which nobody
keeps."""

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tinsmithd.gateway.tinker.room import Room

FLAGS = {
    # Chunks of a call come in the order of their numbers, so each is written down before its
    # promise is given: one whose predecessor has not come yet is only held in memory.
    "parallel_fwdbwd_chunks": False,
    "proto_compress_fwdbwd": True,
    "proto_write_fwdbwd": True,  # of 0.22: newer ones have nothing else, older ones send JSON
    "fwdbwd_max_chunk_len": 1024,
    "fwdbwd_max_chunk_bytes_count": 5_000_000,
    "pjwt_auth_enabled": False,
    "custom_loss_server_side": False,
}


def routes(room: Room) -> Sequence[BaseRoute]:
    """Routes of this module."""

    async def client_config(request: Request) -> Response:
        await room.bodies.json(request)
        return JSONResponse(FLAGS)

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
