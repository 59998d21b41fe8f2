"""What Tinker's REST client tells of sessions, and what only its service has.

A session is the models that one ServiceClient created: their ids begin with its id. Nothing else is
kept of it.
"""

import itertools
import os
import re
import uuid
from typing import Any, Protocol

from tinsmith import _check
from tinsmith._twins import async_twins
from tinsmith.admin_client import Accounts
from tinsmith.errors import NotFoundError, unsupported
from tinsmith.futures import APIFuture, mapped
from tinsmith.types import GetSessionResponse, ListSessionsResponse, TrainingRun

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


@async_twins(
    *("list_sessions", "get_session", "search_sessions", "assign_session_project"),
    *("export_session_trace", "get_sampler", "get_external_weights_urls"),
    *("get_checkpoint_archive_url", "get_checkpoint_archive_url_from_tinker_path"),
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
            ids = [_session_of(run) for run in found.training_runs]
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
            runs = [run for run in found.training_runs if _session_of(run) == wanted]
            if not runs:
                raise NotFoundError(f"no model is of session {wanted}", field="session_id")
            runs.sort(key=lambda run: int(run.training_run_id.rpartition(":")[2]))
            ids = [run.training_run_id for run in runs]
            return GetSessionResponse(ids, [], runs[0].user_metadata)

        return mapped(self.list_training_runs(limit=RUNS_MAX), read)

    def search_sessions(self, request: Any) -> Any:
        """Not supported."""
        raise unsupported("search_sessions", "list_sessions and list_training_runs list them")

    def assign_session_project(self, session_id: str, project_id: str) -> Any:
        """Not supported."""
        raise unsupported("assign_session_project", "there are no projects")

    def export_session_trace(self, session_id: str) -> Any:
        """Not supported."""
        raise unsupported("export_session_trace", "the servers have metrics and logs, no traces")

    def get_sampler(self, sampler_id: str) -> Any:
        """Not supported."""
        why = "samplers are not kept; SamplingClient.get_sampler_handle names what one samples from"
        raise unsupported("get_sampler", why)

    def whoami(self) -> Any:
        """Not supported."""
        raise unsupported("whoami", "there are no accounts; a TrainingRun has its model_owner")

    def get_external_weights_urls(self, tinker_path: str) -> Any:
        """Not supported."""
        raise unsupported("get_external_weights_urls", "use download_checkpoint, which needs none")

    def get_checkpoint_archive_url(self, training_run_id: str, checkpoint_id: str) -> Any:
        """Not supported."""
        raise unsupported("get_checkpoint_archive_url", "use download_checkpoint, which needs none")

    def get_checkpoint_archive_url_from_tinker_path(self, tinker_path: str) -> Any:
        """Not supported."""
        why = "use download_checkpoint, which needs none"
        raise unsupported("get_checkpoint_archive_url_from_tinker_path", why)


def _session_of(run: TrainingRun) -> str | None:
    found = _MODEL_ID.fullmatch(run.training_run_id)
    return found and found[1]
