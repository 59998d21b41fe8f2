"""Paths of sampling."""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tinsmith.v1 import checkpoint_service_pb2 as pb
from tinsmith.v1 import types_pb2
from tinsmithd.gateway.cluster import CHECKPOINT
from tinsmithd.gateway.problems import Problem
from tinsmithd.gateway.tinker import paths
from tinsmithd.gateway.tinker.ids import check_session_id, new_session_id
from tinsmithd.gateway.tinker.room import Room, int_of, text_of
from tinsmithd.gateway.tinker.samples.calls import Samples
from tinsmithd.gateway.tinker.samples.completions import CLONE
from tinsmithd.gateway.tinker.samples.weights import SamplingSession, Weights


def routes(room: Room) -> Sequence[BaseRoute]:
    """Routes of this module."""
    samples = Samples(room)

    async def create_sampling_session(request: Request) -> Response:
        body = await room.bodies.json(request)
        session_id = check_session_id(text_of(body, "session_id"))
        number = int_of(body, "sampling_session_seq_id")
        weights = await _weights_of(room, body)
        sampler_id = weights.sampler_id(session_id, number)
        room.held.heard(session_id)
        return JSONResponse({"sampling_session_id": sampler_id, "type": "create_sampling_session"})

    async def sampler(request: Request) -> Response:
        session = SamplingSession.read(request.path_params["sampler_id"])
        weights = session.weights
        if not weights.checkpoint_path:
            return JSONResponse(_sampler(room, session, weights.base_model))
        checkpoint = await _checkpoint(room, weights.checkpoint_path)
        found = _sampler(room, session, checkpoint.base_model)
        return JSONResponse({**found, "model_path": paths.shown(weights.checkpoint_path)})

    async def asample(request: Request) -> Response:
        body = await room.bodies.json(request)
        if text_of(body, "sampling_session_id", ""):
            session = SamplingSession.read(body["sampling_session_id"])
            number = int_of(body, "seq_id")
        else:
            # Nobody can name such a call again: it has a session of its own.
            weights = await _weights_of(room, body)
            session = SamplingSession.read(weights.sampler_id(new_session_id(), 0))
            number = 0
        return JSONResponse(samples.submit(session, number, body))

    async def join_sampling_session(request: Request) -> Response:
        # Drawn, as a clone draws it that does not ask: whatever gateway it asks, nobody counts.
        SamplingSession.read(text_of(await room.bodies.json(request), "sampling_session_id"))
        number = 1 + secrets.randbelow(CLONE - 1)
        return JSONResponse({"client_counter": number, "type": "join_sampling_session"})

    async def retrieve_futures(request: Request) -> Response:
        body = await room.bodies.json(request)
        return JSONResponse(await samples.completions.poll(body, room.settings.poll_s_max))

    async def cancel_future(request: Request) -> Response:
        body = await room.bodies.json(request)
        room.promises.cancel(text_of(body, "request_id"))
        return JSONResponse({})

    return [
        Route("/create_sampling_session", create_sampling_session, methods=["POST"]),
        Route("/samplers/{sampler_id}", sampler),
        Route("/asample", asample, methods=["POST"]),
        Route("/cancel_future", cancel_future, methods=["POST"]),
        Route("/join_sampling_session", join_sampling_session, methods=["POST"]),
        Route("/retrieve_futures", retrieve_futures, methods=["POST"]),
    ]


def _sampler(room: Room, session: SamplingSession, base_model: str) -> dict[str, str]:
    # The SDK loads the tokenizer by this name.
    base_model = room.names.tokenizer_id(base_model)
    return {"sampler_id": session.sampler_id, "base_model": base_model}


async def _weights_of(room: Room, body: Mapping[str, Any]) -> Weights:
    """What a body asks to sample from, after a look whether it is there."""
    path = text_of(body, "model_path", "")
    if path:
        found = await _checkpoint(room, paths.stored(path, "model_path"))
        if found.kind != types_pb2.CHECKPOINT_KIND_SAMPLER:
            message = (
                f"model_path: {path} is a training checkpoint; sample from what "
                "save_weights_for_sampler saved"
            )
            raise Problem(400, message, "WRONG_CHECKPOINT_KIND", "model_path")
        return Weights.of_checkpoint(found)
    name = text_of(body, "base_model", "")
    if not name:
        raise Problem(400, "base_model: needed where there is no model_path", field="base_model")
    held = [each.name for each in (await room.cluster.capabilities()).base_models]
    return Weights(room.names.served(name, held))


async def _checkpoint(room: Room, path: str) -> pb.Checkpoint:
    request = pb.GetCheckpointRequest(checkpoint_path=path)

    async def ask() -> pb.GetCheckpointResponse:
        return await (await room.cluster.checkpoint()).GetCheckpoint(request)

    return (await room.cluster.asking("get_checkpoint", ask, service=CHECKPOINT)).checkpoint
