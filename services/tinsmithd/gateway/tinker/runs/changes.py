"""What a caller changes of a checkpoint: its life, its mark, its copies."""

import hashlib
import secrets
from collections.abc import Sequence
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tinsmith.checkpoints import PUBLIC_MARK
from tinsmith.errors import NotFoundError
from tinsmith.v1 import checkpoint_service_pb2 as pb
from tinsmithd.gateway.cluster import CHECKPOINT
from tinsmithd.gateway.problems import Problem
from tinsmithd.gateway.tinker import paths
from tinsmithd.gateway.tinker.ids import check_session_id, model_id_of
from tinsmithd.gateway.tinker.room import Room, int_of, text_of
from tinsmithd.gateway.tinker.runs.catalogue import Catalogue

TTL_S_MAX = 10 * 366 * 24 * 3600
"""The SDK's own bound; the Checkpoint server has one too."""
ONE = "/training_runs/{run}/checkpoints/{kind}/{name}"
IDEMPOTENCY_KEY = "x-idempotency-key"


def path_of(request: Request) -> str:
    """The checkpoint that a request's URL names, as the Checkpoint server has it.

    Raises:
        Problem: 404, there is no such kind.
    """
    run, kind, name = (request.path_params[each] for each in ("run", "kind", "name"))
    if kind not in paths.KINDS:
        raise Problem(404, f"there is no such kind of checkpoint: {kind[:40]!r}")
    return paths.stored_of(run, kind, name)


def ttl_of(body: dict[str, Any]) -> Duration | None:
    """`ttl_seconds` of a body; null and absent mean for ever.

    Raises:
        Problem: 400.
    """
    if body.get("ttl_seconds") is None:
        return None
    return Duration(seconds=int_of(body, "ttl_seconds", least=1, most=TTL_S_MAX))


def routes(room: Room, catalogue: Catalogue) -> Sequence[BaseRoute]:
    """Routes of this module."""

    async def delete(request: Request) -> Response:
        ask = pb.DeleteCheckpointRequest(checkpoint_path=path_of(request))
        attempts = 0

        async def attempt() -> None:
            nonlocal attempts
            attempts += 1
            await (await room.cluster.checkpoint()).DeleteCheckpoint(ask)

        try:
            await room.cluster.asking("delete_checkpoint", attempt, service=CHECKPOINT)
        except NotFoundError:
            # An attempt before this one may have deleted it, and its answer was lost.
            if attempts == 1 and request.headers.get("x-stainless-retry-count", "0") == "0":
                raise
        return Response(status_code=204)

    async def set_ttl(request: Request) -> Response:
        ttl = ttl_of(await room.bodies.json(request))
        ask = pb.UpdateCheckpointRequest(
            checkpoint_path=path_of(request), update_mask=FieldMask(paths=["ttl"]), ttl=ttl
        )
        await catalogue.call("UpdateCheckpoint", ask)
        return JSONResponse({})

    async def mark(request: Request) -> Response:
        path = path_of(request)
        metadata = dict((await catalogue.checkpoint(path)).user_metadata)
        if request.method == "POST":
            metadata[PUBLIC_MARK] = "true"
        else:
            metadata.pop(PUBLIC_MARK, None)
        ask = pb.UpdateCheckpointRequest(
            checkpoint_path=path,
            update_mask=FieldMask(paths=["user_metadata"]),
            user_metadata=metadata,
        )
        await catalogue.call("UpdateCheckpoint", ask)
        return JSONResponse({})

    async def copy(request: Request) -> Response:
        ask = _copy_of(request, await room.bodies.json(request))
        made = await catalogue.call("CopyCheckpoint", ask)
        return JSONResponse({"tinker_path": paths.shown(made.checkpoint.checkpoint_path)})

    return [
        Route(ONE, delete, methods=["DELETE"]),
        Route(f"{ONE}/publish", mark, methods=["POST", "DELETE"]),
        Route(f"{ONE}/ttl", set_ttl, methods=["PUT"]),
        Route("/copy_weights", copy, methods=["POST"]),
    ]


def _copy_of(request: Request, body: dict[str, Any]) -> pb.CopyCheckpointRequest:
    if body.get("weights_access_token") or request.headers.get("x-tinker-weights-access-token"):
        message = "weights_access_token: there are no access tokens here"
        raise Problem(400, message, "INVALID_FIELD", "weights_access_token")
    source = paths.stored(text_of(body, "source_path"), "source_path")
    key = request.headers.get(IDEMPOTENCY_KEY) or secrets.token_hex(16)
    if body.get("session_id"):
        session = check_session_id(text_of(body, "session_id"))
        run = model_id_of(session, int_of(body, "model_seq_id"))
    else:
        run = "copy-" + hashlib.sha256(key.encode()).hexdigest()[:32]
    _, kind, name = paths.split(source)
    return pb.CopyCheckpointRequest(
        source_checkpoint_path=source,
        destination_checkpoint_path=paths.stored_of(run, kind, name),
        ttl=ttl_of(body),
        request_id=hashlib.sha256(f"copy {key}".encode()).hexdigest(),
    )
