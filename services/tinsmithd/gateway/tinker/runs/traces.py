"""`trace_export`: what a session did, as a timeline that Perfetto (ui.perfetto.dev) shows.

It is made of what the cluster remembers when somebody downloads it: the steps of each run, with
their metrics, and the checkpoints. Samples are not remembered, and are not in it.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from google.protobuf.timestamp_pb2 import Timestamp
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tinsmith.v1 import training_service_pb2 as pb
from tinsmithd.domain import DEFAULT_OWNER
from tinsmithd.gateway.callers import act_for, part
from tinsmithd.gateway.problems import Problem
from tinsmithd.gateway.tinker import paths
from tinsmithd.gateway.tinker.pieces import answer_of
from tinsmithd.gateway.tinker.room import Room
from tinsmithd.gateway.tinker.runs.catalogue import PAGE_SIZE, Catalogue, Run
from tinsmithd.gateway.tinker.runs.signing import Signer, public_base

PAGES_MAX = 20
"""Pages of steps of one run that a trace has, the newest ones."""
FILE = "trace"

Event = Mapping[str, Any]


def routes(room: Room, catalogue: Catalogue) -> Sequence[BaseRoute]:
    """Routes of this module."""
    signer = Signer(room.settings)

    async def export(request: Request) -> Response:
        session_id = request.path_params["session_id"]
        runs = await _runs(catalogue, session_id)
        expires = signer.expiry()
        owner = runs[0].owner if part() else ""
        query = signer.query(_signed(session_id), FILE, b"", expires, owner)
        base = public_base(request, room.settings)
        url = f"{base}/api/v1/files/traces/{quote(session_id, safe='')}?{query}"
        return JSONResponse({"status": "ready", "url": url})

    async def trace(request: Request) -> Response:
        session_id = request.path_params["session_id"]
        _, owner = signer.check(_signed(session_id), FILE, request.query_params)
        act_for(owner or DEFAULT_OWNER)
        events: list[Event] = []
        for number, run in enumerate(await _runs(catalogue, session_id), 1):
            steps = await _steps(room, run)
            events += _events(number, run, steps)
        text = json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, separators=(",", ":"))
        return answer_of(text.encode(), "application/json")

    return [
        Route("/sessions/{session_id}/trace_export", export),
        Route("/files/traces/{session_id}", trace),
    ]


def _signed(session_id: str) -> str:
    return f"session {session_id}"


async def _runs(catalogue: Catalogue, session_id: str) -> Sequence[Run]:
    # Sessions of this cluster's own client have ids of another form.
    begins = f"{session_id}:train:"
    found: dict[int, Run] = {}
    for run in await catalogue.runs():
        number = run.run_id.removeprefix(begins)
        if number != run.run_id and number.isascii() and number.isdigit():
            found[int(number[:20])] = run
    if not found:
        message = "session_id: there is no run of such a session"
        raise Problem(404, message, field="session_id")
    return [run for _, run in sorted(found.items())]


async def _steps(room: Room, run: Run) -> Sequence[pb.Step]:
    """The steps of a run, oldest first; none of one that is gone."""
    found: list[pb.Step] = []
    token = ""
    for _ in range(PAGES_MAX if run.model is not None else 0):
        request = pb.ListStepsRequest(model_id=run.run_id, page_size=PAGE_SIZE, page_token=token)

        async def ask(request: pb.ListStepsRequest = request) -> pb.ListStepsResponse:
            return await room.cluster.training.ListSteps(request)

        page = await room.cluster.asking("list_steps", ask)
        found.extend(page.steps)
        token = page.next_page_token
        if not token:
            break
    return found[::-1]


def _events(number: int, run: Run, steps: Sequence[pb.Step]) -> Iterator[Event]:
    """A run as a process of the trace: a slice for each step, from the step before to it."""
    where = {"pid": number, "tid": 1}
    yield {"ph": "M", "name": "process_name", **where, "args": {"name": run.run_id}}
    yield {"ph": "M", "name": "thread_name", **where, "args": {"name": "steps"}}
    before_us = None if run.model is None else _us(run.model.create_time)
    for step in steps:
        at_us = _us(step.create_time)
        metrics = {name: value for name, value in step.metrics.items() if math.isfinite(value)}
        begun_us = at_us if before_us is None else min(before_us, at_us)
        slice_ = {"ph": "X", "name": f"to step {step.step_count}", "cat": "step", **where}
        yield {**slice_, "ts": begun_us, "dur": at_us - begun_us, "args": metrics}
        if (tokens := metrics.get("tokens:sum")) and "loss:sum" in metrics:
            value = {"value": metrics["loss:sum"] / tokens}
            yield {"ph": "C", "name": "loss per token", **where, "ts": at_us, "args": value}
        before_us = at_us
    for each in reversed(run.checkpoints):
        _, kind, name = paths.split(each.checkpoint_path)
        mark = {"ph": "i", "s": "p", "name": f"{kind}/{name}", "cat": "checkpoint", **where}
        yield {**mark, "ts": _us(each.create_time), "args": {"bytes": each.size_bytes}}


def _us(stamp: Timestamp) -> int:
    return stamp.ToMicroseconds()
