"""What there is: runs, checkpoints, what a checkpoint holds, and how much they all take."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tinsmith.v1.checkpoint_service_pb2 import Checkpoint
from tinsmithd.gateway.problems import Problem
from tinsmithd.gateway.tinker import paths
from tinsmithd.gateway.tinker.pieces import answer_of
from tinsmithd.gateway.tinker.room import INT64_MAX, Room, text_of
from tinsmithd.gateway.tinker.runs.catalogue import Catalogue, checkpoint_as_json, knows_external

PROJECT = "default"
"""The one project that there is."""
LIMIT_MAX = 1000
GIGABYTE = 10**9


def routes(room: Room, catalogue: Catalogue) -> Sequence[BaseRoute]:
    """Routes of this module."""

    async def training_runs(request: Request) -> Response:
        offset, limit = page_of(request, 20)
        check_project(request.query_params.get("project_id") or PROJECT)
        runs = await catalogue.runs()
        found = [each.as_json(room.names) for each in runs[offset : offset + limit]]
        return JSONResponse({"training_runs": found, "cursor": cursor(offset, limit, len(runs))})

    async def training_run(request: Request) -> Response:
        run = await catalogue.run(request.path_params["run"])
        return JSONResponse(run.as_json(room.names))

    async def run_checkpoints(request: Request) -> Response:
        found = await catalogue.checkpoints(request.path_params["run"])
        known = knows_external(request)
        listed = {"checkpoints": [checkpoint_as_json(each, known) for each in found]}
        return answer_of(json.dumps(listed).encode(), "application/json")

    async def all_checkpoints(request: Request) -> Response:
        offset, limit = page_of(request, 100)
        found = await catalogue.checkpoints()
        known = knows_external(request)
        page = [checkpoint_as_json(each, known) for each in found[offset : offset + limit]]
        return JSONResponse({"checkpoints": page, "cursor": cursor(offset, limit, len(found))})

    async def weights_info(request: Request) -> Response:
        body = await room.bodies.json(request)
        path = paths.stored(text_of(body, "tinker_path"), "tinker_path")
        found = await catalogue.checkpoint(path)
        info: dict[str, Any] = {"base_model": room.names.public(found.base_model), "is_lora": False}
        if found.WhichOneof("tuning") != "full_config":
            lora = found.lora_config
            info |= {
                "is_lora": True,
                "lora_rank": lora.rank,
                "train_unembed": lora.train_unembed,
                "train_mlp": lora.train_mlp,
                "train_attn": lora.train_attn,
            }
        return JSONResponse(info)

    async def storage(request: Request) -> Response:
        check_project(request.query_params.get("project_id") or PROJECT)
        return JSONResponse({"data": _storage(await catalogue.checkpoints(named=False))})

    return [
        Route("/training_runs", training_runs),
        Route("/training_runs/{run}", training_run),
        Route("/training_runs/{run}/checkpoints", run_checkpoints),
        Route("/models/{run}/checkpoints", run_checkpoints),
        Route("/checkpoints", all_checkpoints),
        Route("/weights_info", weights_info, methods=["POST"]),
        Route("/billing/usage/checkpoints/current", storage),
    ]


def check_project(name: str) -> None:
    """Refuse any other project than the one that there is.

    Raises:
        Problem: 400: it is another one.
    """
    if name != PROJECT:
        message = f"project_id: there is one project here, {PROJECT!r}, and all is in it"
        raise Problem(400, message, "INVALID_FIELD", "project_id")


def _storage(checkpoints: Sequence[Checkpoint]) -> Sequence[Mapping[str, Any]]:
    """What the checkpoints of each owner take. Nothing is billed, so nothing has a price."""
    owners: dict[str, list[int]] = {}
    for each in checkpoints:
        owners.setdefault(each.owner, []).append(each.size_bytes)
    return [
        {
            "user_name": owner,
            "checkpoint_count": len(sizes),
            "size_bytes": sum(sizes),
            "size_gigabytes": sum(sizes) / GIGABYTE,
        }
        for owner, sizes in sorted(owners.items())
    ]


def page_of(request: Request, limit: int) -> tuple[int, int]:
    """Offset and limit of a request's query; too large a limit means `LIMIT_MAX`.

    Raises:
        Problem: 400, naming the parameter.
    """
    found = []
    for name, default in (("offset", 0), ("limit", limit)):
        text = request.query_params.get(name, str(default))
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            message = f"{name}: expected a whole number from 0 to {INT64_MAX}"
            raise Problem(400, message, "INVALID_FIELD", name)
        found.append(int(text))
    return found[0], min(found[1], LIMIT_MAX)


def cursor(offset: int, limit: int, total: int) -> Mapping[str, int]:
    """Where a page is."""
    return {"offset": offset, "limit": limit, "total_count": total}
