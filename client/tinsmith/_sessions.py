"""What Tinker's REST client tells of sessions, and what only its service has.

A session is the models that one ServiceClient created: their ids begin with its id. Nothing else is
kept of it.
"""

import itertools
import os
import re
import uuid
from typing import Any, Protocol

from tinsmith import _check, _handle, _loop, _search
from tinsmith._connection import CHECKPOINT
from tinsmith._twins import async_twins
from tinsmith.admin_client import PROJECT, Accounts
from tinsmith.checkpoints import shown
from tinsmith.errors import NotFoundError
from tinsmith.futures import APIFuture, mapped
from tinsmith.types import (
    GetSamplerResponse,
    GetSessionResponse,
    ListSessionsResponse,
    SessionSearchRequest,
    SessionSearchResponse,
    WhoamiResponse,
)
from tinsmith.v1 import checkpoint_service_pb2 as pb

_MODEL_ID = re.compile(r"(.+):train:[0-9]+")
RUNS_MAX = 10**9


class Session:
    """Names the models of one ServiceClient; in a forked process they are of another session."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._session_id = str(uuid.uuid4())
        self._numbers = itertools.count()

    def next_model_id(self) -> str:
        """The id of its next model; the first has number 0. From any thread."""
        if self._pid != os.getpid():
            self._begin()
        return f"{self._session_id}:train:{next(self._numbers)}"


class _Runs(Protocol):
    def list_training_runs(self, limit: int = ..., offset: int = ...) -> APIFuture[Any]: ...

    def get_session(self, session_id: str) -> APIFuture[Any]: ...


@async_twins(
    *("list_sessions", "get_session", "search_sessions", "assign_session_project"),
    *("get_sampler", "whoami"),
    final=True,
)
class Sessions(Accounts):
    """The part of RestClient for sessions."""

    def list_sessions(
        self: _Runs, limit: int = 20, offset: int = 0, access_scope: str = "owned"
    ) -> APIFuture[ListSessionsResponse]:
        """Ids of the sessions that have models, the one with the newest model first."""
        limit = _check.whole(limit, "limit", 0)
        offset = _check.whole(offset, "offset", 0)

        def read(found: Any) -> ListSessionsResponse:
            ids = [session_of(run.training_run_id) for run in found.training_runs]
            sessions = list(dict.fromkeys(filter(None, ids)))
            return ListSessionsResponse(sessions[offset : offset + limit])

        return mapped(self.list_training_runs(limit=RUNS_MAX), read)

    def get_session(
        self: _Runs, session_id: str, access_scope: str = "owned"
    ) -> APIFuture[GetSessionResponse]:
        """The models of a session, in the order of their creation; samplers are not kept.

        Raises:
            NotFoundError: It has none; from the future.
        """
        wanted = _check.text(session_id, "session_id")

        def read(found: Any) -> GetSessionResponse:
            runs = [run for run in found.training_runs if session_of(run.training_run_id) == wanted]
            if not runs:
                raise NotFoundError(f"no model is of session {wanted}", field="session_id")
            runs.sort(key=lambda run: int(run.training_run_id.rpartition(":")[2]))
            ids = [run.training_run_id for run in runs]
            return GetSessionResponse(ids, [], runs[0].user_metadata)

        return mapped(self.list_training_runs(limit=RUNS_MAX), read)

    def search_sessions(self, request: SessionSearchRequest) -> APIFuture[SessionSearchResponse]:
        """Sessions that have models, newest first, by id or by what their models' metadata have."""
        asked = _search.checked(request)
        return APIFuture(_loop.run(_search.search(self._connection, asked, session_of)))

    def assign_session_project(self: "_Runs", session_id: str, project_id: str) -> APIFuture[None]:
        """Say which project a session is of: `default` is the one that there is.

        Raises:
            NotFoundError: There is no such session; from the future.
        """
        if _check.text(project_id, "project_id") != PROJECT:
            message = f"there is one project here, {PROJECT!r}, and all is in it"
            raise _check.refuse("project_id", message)
        return mapped(self.get_session(session_id), lambda _: None)

    def get_sampler(self, sampler_id: str) -> APIFuture[GetSamplerResponse]:
        """What a sampler samples from.

        Args:
            sampler_id: What `SamplingClient.get_sampler_handle` gave.

        Raises:
            InvalidArgumentError: It is none.
            NotFoundError: Its checkpoint is gone; from the future.
        """
        _, base_model, path, _ = _handle.read(_check.text(sampler_id, "sampler_id"))

        async def ask() -> GetSamplerResponse:
            if path is None:
                return GetSamplerResponse(sampler_id, base_model)
            request = pb.GetCheckpointRequest(checkpoint_path=path)

            async def attempt() -> pb.GetCheckpointResponse:
                return await (await self._connection.checkpoint()).GetCheckpoint(request)

            found = await self._connection.retrying("get_sampler", attempt, service=CHECKPOINT)
            return GetSamplerResponse(sampler_id, found.checkpoint.base_model, shown(path))

        return APIFuture(_loop.run(ask()))

    def whoami(self) -> APIFuture[WhoamiResponse]:
        """Whom the servers take the caller for: the tenant of the key; "default" without keys."""

        async def ask() -> WhoamiResponse:
            owner = (await self._connection.told()).owner
            return WhoamiResponse(f"urn:tinsmith:tenant:{owner}", "urn:tinsmith:cluster")

        return APIFuture(_loop.run(ask()))


def session_of(model_id: str) -> str | None:
    """The session of a model's id; None where it has none."""
    found = _MODEL_ID.fullmatch(model_id)
    return found and found[1]
