"""What the cluster has, in the SDK's words: runs with their checkpoints.

A run is a model, or what is left of one that is gone: its checkpoints. Weights that were saved
without a name belong to samplers, and are listed nowhere.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from starlette.requests import Request

from tinsmith.checkpoints import PUBLIC_MARK
from tinsmith.errors import NotFoundError
from tinsmith.v1 import checkpoint_service_pb2, training_service_pb2
from tinsmithd.gateway.cluster import CHECKPOINT, Cluster
from tinsmithd.gateway.names import BaseModelNames
from tinsmithd.gateway.problems import Problem
from tinsmithd.gateway.tinker import paths
from tinsmithd.gateway.tinker.runs.together import Together

PAGE_SIZE = 1000
PAGES_MAX = 200
"""Pages that one request looks through; what is beyond is not listed."""
EXTERNAL_SINCE = (0, 28)
_TYPES = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}


@dataclass
class Run:
    """A run.

    Attributes:
        run_id: Its id, which is its model's.
        model: The model; None where it is gone.
        checkpoints: Those with a name, newest first.
    """

    run_id: str
    model: training_service_pb2.Model | None = None
    checkpoints: list[checkpoint_service_pb2.Checkpoint] = field(default_factory=list)

    @property
    def owner(self) -> str:
        """Whose it is."""
        return (self.model or self.checkpoints[0]).owner

    def as_json(self, names: BaseModelNames) -> Mapping[str, Any]:
        """`TrainingRun`."""
        said = self.model or self.checkpoints[0]
        is_lora = said.WhichOneof("tuning") != "full_config"
        last_s = self.checkpoints[0].create_time if self.checkpoints else None
        lost = training_service_pb2.MODEL_STATE_LOST
        return {
            "training_run_id": self.run_id,
            "base_model": names.public(said.base_model),
            "model_owner": self.owner,
            "is_lora": is_lora,
            "lora_rank": said.lora_config.rank or None if is_lora else None,
            "corrupted": self.model is not None and self.model.state == lost,
            "last_request_time": _time(
                self.model.last_request_time if self.model is not None else last_s
            ),
            "last_checkpoint": self._newest("weights"),
            "last_sampler_checkpoint": self._newest("sampler_weights"),
            "user_metadata": dict(self.model.user_metadata) if self.model is not None else None,
        }

    def _newest(self, kind: str) -> Mapping[str, Any] | None:
        for each in self.checkpoints:
            if paths.split(each.checkpoint_path)[1] == kind:
                return checkpoint_as_json(each)
        return None


def knows_external(request: Request) -> bool:
    """Whether the SDK that asks knows external weights; others take no such checkpoint."""
    said = request.headers.get("x-stainless-package-version", "").split(".")[:2]
    if not all(part.isdecimal() and len(part) < 6 for part in said) or len(said) < 2:
        return True
    return (int(said[0]), int(said[1])) >= EXTERNAL_SINCE


def checkpoint_as_json(
    found: checkpoint_service_pb2.Checkpoint, external: bool = True
) -> Mapping[str, Any]:
    """`Checkpoint`.

    Args:
        found: What it is.
        external: Whether external weights are called so, or what they are stored as.
    """
    path = found.checkpoint_path
    run, kind, name = paths.split(path) if external else paths.split_stored(path)
    metadata = dict(found.user_metadata)
    public = metadata.pop(PUBLIC_MARK, "") == "true"
    return {
        "checkpoint_id": f"{kind}/{name}",
        "checkpoint_type": _TYPES[kind],
        "time": _time(found.create_time),
        "tinker_path": f"tinker://{run}/{kind}/{name}",
        "size_bytes": found.size_bytes,
        "public": public,
        "user_metadata": metadata or None,
        "expires_at": _time(found.expire_time) if found.HasField("expire_time") else None,
    }


def _time(stamp: Timestamp | None) -> str:
    when = datetime.fromtimestamp(0, UTC) if stamp is None else stamp.ToDatetime(UTC)
    return when.isoformat()


class Catalogue:
    """Reads what the cluster has.

    Args:
        cluster: Where from.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._together = Together()

    async def runs(self) -> Sequence[Run]:
        """All runs: models newest first, then what is left of others."""
        return await self._together.look("runs", self._runs)

    async def _runs(self) -> Sequence[Run]:
        async with asyncio.TaskGroup() as group:
            models = group.create_task(self._models())
            checkpoints = group.create_task(self.checkpoints())
        runs = {each.model_id: Run(each.model_id, each) for each in models.result()}
        for each in checkpoints.result():
            runs.setdefault(each.model_id, Run(each.model_id)).checkpoints.append(each)
        return list(runs.values())

    async def run(self, run_id: str) -> Run:
        """One run.

        Raises:
            Problem: 404, there is none.
        """
        run = Run(run_id, checkpoints=list(await self.checkpoints(run_id)))
        request = training_service_pb2.GetModelRequest(model_id=run_id)

        async def ask() -> training_service_pb2.GetModelResponse:
            return await self._cluster.training.GetModel(request)

        try:
            run.model = (await self._cluster.asking("get_training_run", ask)).model
        except NotFoundError:
            if not run.checkpoints:
                message = f"training_run_id: there is no training run {run_id[:100]!r}"
                raise Problem(404, message, "MODEL_NOT_FOUND", "training_run_id") from None
        return run

    async def checkpoints(
        self, run_id: str = "", *, named: bool = True
    ) -> Sequence[checkpoint_service_pb2.Checkpoint]:
        """Checkpoints of one run or of all, newest first.

        Args:
            run_id: The run; empty for all.
            named: Leave out those without a name.
        """
        found = await self._together.look(("checkpoints", run_id), lambda: self._all(run_id))
        return [each for each in found if not (named and each.ephemeral)]

    async def _all(self, run_id: str) -> Sequence[checkpoint_service_pb2.Checkpoint]:
        return [each async for each in self._checkpoints(run_id)]

    async def checkpoint(self, path: str) -> checkpoint_service_pb2.Checkpoint:
        """What a path of the Checkpoint server's means.

        Raises:
            TinsmithError: There is none.
        """
        request = checkpoint_service_pb2.GetCheckpointRequest(checkpoint_path=path)
        response: checkpoint_service_pb2.GetCheckpointResponse = await self.call(
            "GetCheckpoint", request
        )
        return response.checkpoint

    async def call(self, method: str, request: Any) -> Any:
        """A unary call of the Checkpoint service, repeated until it is answered.

        Raises:
            TinsmithError: The answer, where it is a refusal.
            TimeoutError: There was none in time.
        """

        async def ask() -> Any:
            return await getattr(await self._cluster.checkpoint(), method)(request)

        return await self._cluster.asking(method, ask, service=CHECKPOINT)

    async def _checkpoints(self, run_id: str) -> AsyncIterator[checkpoint_service_pb2.Checkpoint]:
        token = ""
        for _ in range(PAGES_MAX):
            request = checkpoint_service_pb2.ListCheckpointsRequest(
                model_id=run_id, page_size=PAGE_SIZE, page_token=token
            )
            page = await self.call("ListCheckpoints", request)
            for each in page.checkpoints:
                yield each
            token = page.next_page_token
            if not token:
                return

    async def _models(self) -> Sequence[training_service_pb2.Model]:
        found: list[training_service_pb2.Model] = []
        token = ""
        for _ in range(PAGES_MAX):
            request = training_service_pb2.ListModelsRequest(page_size=PAGE_SIZE, page_token=token)

            async def ask(
                request: training_service_pb2.ListModelsRequest = request,
            ) -> training_service_pb2.ListModelsResponse:
                return await self._cluster.training.ListModels(request)

            page = await self._cluster.asking("list_training_runs", ask)
            found.extend(page.models)
            token = page.next_page_token
            if not token:
                break
        return found
