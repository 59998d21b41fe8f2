"""`RestClient`: looks after checkpoints and runs. (The name is Tinker's; there is no REST.)"""

import os
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf.field_mask_pb2 import FieldMask

from tinsmith import _check, _loop
from tinsmith._connection import CHECKPOINT, Connection
from tinsmith._convert import checkpoint_from_pb
from tinsmith._download import download
from tinsmith._lifetime import delete_model
from tinsmith._sessions import Sessions
from tinsmith._twins import async_twins
from tinsmith._urls import Urls
from tinsmith.addresses import address_of
from tinsmith.checkpoints import PUBLIC_MARK, shown, stored
from tinsmith.errors import unsupported
from tinsmith.futures import APIFuture
from tinsmith.keys import shown_of
from tinsmith.types import (
    Checkpoint,
    CheckpointsListResponse,
    Cursor,
    GetServerCapabilitiesResponse,
    ParsedCheckpointTinkerPath,
    SupportedModel,
    TrainingRun,
    TrainingRunsResponse,
    WeightsInfoResponse,
)
from tinsmith.v1 import checkpoint_service_pb2 as pb
from tinsmith.v1 import training_service_pb2

T = TypeVar("T")
PAGE_SIZE = 1000


async def capabilities_of(connection: Connection) -> GetServerCapabilitiesResponse:
    """What the cluster can do now."""
    found = await connection.capabilities()
    models = [SupportedModel(m.name, m.context_length, True, True) for m in found.base_models]
    return GetServerCapabilitiesResponse(models)


@async_twins(
    *("get_server_capabilities", "get_training_run", "get_training_run_by_tinker_path"),
    *("get_weights_info_by_tinker_path", "list_training_runs", "list_checkpoints"),
    *("list_user_checkpoints", "delete_checkpoint", "delete_checkpoint_from_tinker_path"),
    *("publish_checkpoint_from_tinker_path", "unpublish_checkpoint_from_tinker_path"),
    *("set_checkpoint_ttl_from_tinker_path", "copy_weights", "download_checkpoint"),
    "delete_model",
    final=True,
)
class RestClient(Sessions, Urls):
    """Looks after checkpoints and runs; every method returns a future.

    Args:
        connection: Internal; users pass `base_url`.
        base_url: As in `ServiceClient`.
        api_key: As in `ServiceClient`.
    """

    def __init__(
        self,
        connection: Connection | None = None,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
    ) -> None:
        if connection is None:
            connection = Connection(address_of(base_url), shown=shown_of(api_key))
        self._connection = connection

    # --- runs ---------------------------------------------------------------------------------

    def get_server_capabilities(self) -> APIFuture[GetServerCapabilitiesResponse]:
        """What the cluster can do."""
        return APIFuture(_loop.run(capabilities_of(self._connection)))

    def get_training_run(
        self, training_run_id: str, access_scope: str = "owned"
    ) -> APIFuture[TrainingRun]:
        """One model."""
        run = _check.text(training_run_id, "training_run_id")
        request = training_service_pb2.GetModelRequest(model_id=run)

        async def ask() -> TrainingRun:
            stub = self._connection.training()
            response = await self._connection.retrying(
                "get_training_run", lambda: stub.GetModel(request)
            )
            checkpoints = await self._all_checkpoints(run)
            return _run_from_pb(response.model, checkpoints)

        return APIFuture(_loop.run(ask()))

    def get_training_run_by_tinker_path(
        self, tinker_path: str, access_scope: str = "owned"
    ) -> APIFuture[TrainingRun]:
        """The model that a checkpoint was saved from."""
        parsed = ParsedCheckpointTinkerPath.from_tinker_path(tinker_path)
        return self.get_training_run(parsed.training_run_id)

    def list_training_runs(
        self,
        limit: int = 20,
        offset: int = 0,
        access_scope: str = "owned",
        project_id: str | None = None,
    ) -> APIFuture[TrainingRunsResponse]:
        """Models, newest first."""
        limit = _check.whole(limit, "limit", 0)
        offset = _check.whole(offset, "offset", 0)

        async def ask() -> TrainingRunsResponse:
            models: list[training_service_pb2.Model] = []
            token, total = "", 0
            while len(models) < offset + limit:
                request = training_service_pb2.ListModelsRequest(
                    page_size=PAGE_SIZE, page_token=token
                )
                stub = self._connection.training()
                response = await self._connection.retrying(
                    "list_training_runs",
                    lambda s=stub, r=request: s.ListModels(r),  # type: ignore[misc]
                )
                models.extend(response.models)
                token, total = response.next_page_token, response.total_size
                if not token:
                    break
            runs = [_run_from_pb(model, []) for model in models[offset : offset + limit]]
            return TrainingRunsResponse(runs, Cursor(offset, limit, total))

        return APIFuture(_loop.run(ask()))

    def delete_model(self, model_id: str) -> APIFuture[None]:
        """Delete a model: what trains, not its checkpoints; those stay.

        Calls of it that were not answered yet fail with NotFoundError.

        Raises:
            NotFoundError: There is none (MODEL_NOT_FOUND); from the future.
        """
        name = _check.text(model_id, "model_id")
        return APIFuture(_loop.run(delete_model(self._connection, name)))

    # --- checkpoints --------------------------------------------------------------------------

    def list_checkpoints(self, training_run_id: str) -> APIFuture[CheckpointsListResponse]:
        """All checkpoints of one model, newest first."""
        run = _check.text(training_run_id, "training_run_id")

        async def ask() -> CheckpointsListResponse:
            return CheckpointsListResponse(await self._all_checkpoints(run))

        return APIFuture(_loop.run(ask()))

    def list_user_checkpoints(
        self, limit: int = 100, offset: int = 0
    ) -> APIFuture[CheckpointsListResponse]:
        """Checkpoints of all models, newest first."""
        limit = _check.whole(limit, "limit", 0)
        offset = _check.whole(offset, "offset", 0)

        async def ask() -> CheckpointsListResponse:
            found = await self._all_checkpoints("")
            page = found[offset : offset + limit]
            return CheckpointsListResponse(page, Cursor(offset, limit, len(found)))

        return APIFuture(_loop.run(ask()))

    async def _all_checkpoints(self, model_id: str) -> list[Checkpoint]:
        found: list[Checkpoint] = []
        token = ""
        while True:
            request = pb.ListCheckpointsRequest(
                model_id=model_id, page_size=PAGE_SIZE, page_token=token
            )
            response = await self._call("ListCheckpoints", request)
            found.extend(map(checkpoint_from_pb, response.checkpoints))
            token = response.next_page_token
            if not token:
                return found

    def get_weights_info_by_tinker_path(self, tinker_path: str) -> APIFuture[WeightsInfoResponse]:
        """What a checkpoint holds."""

        def read(response: pb.GetCheckpointResponse) -> WeightsInfoResponse:
            found = response.checkpoint
            if found.WhichOneof("tuning") == "full_config":
                return WeightsInfoResponse(base_model=found.base_model, is_lora=False)
            lora = found.lora_config
            return WeightsInfoResponse(
                base_model=found.base_model,
                is_lora=True,
                lora_rank=lora.rank,
                train_unembed=lora.train_unembed,
                train_mlp=lora.train_mlp,
                train_attn=lora.train_attn,
            )

        request = pb.GetCheckpointRequest(checkpoint_path=_path_of(tinker_path))
        return self._ask("GetCheckpoint", request, read)

    def delete_checkpoint(self, training_run_id: str, checkpoint_id: str) -> APIFuture[None]:
        """Delete a checkpoint by its run and `weights/<name>` or `sampler_weights/<name>`."""
        run = _check.text(training_run_id, "training_run_id")
        path = f"tinsmith://{run}/{_check.text(checkpoint_id, 'checkpoint_id')}"
        return self.delete_checkpoint_from_tinker_path(path)

    def delete_checkpoint_from_tinker_path(
        self, tinker_path: str | None = None, *, path: str | None = None
    ) -> APIFuture[None]:
        """Delete a checkpoint; `path` is another name of the parameter, as below."""
        request = pb.DeleteCheckpointRequest(checkpoint_path=_path_of(tinker_path, path))
        attempts = 0

        async def attempt() -> None:
            nonlocal attempts
            attempts += 1
            try:
                await (await self._connection.checkpoint()).DeleteCheckpoint(request)
            except grpc.RpcError as error:
                # An attempt before this one may have deleted it, and its answer was lost.
                if attempts == 1 or error.code() is not grpc.StatusCode.NOT_FOUND:
                    raise

        return APIFuture(_loop.run(self._retrying("DeleteCheckpoint", attempt)))

    def publish_checkpoint_from_tinker_path(
        self, tinker_path: str | None = None, *, path: str | None = None
    ) -> APIFuture[None]:
        """Mark a checkpoint as public: `Checkpoint.public`. Who may read it stays as it is."""
        return self._mark(_path_of(tinker_path, path), public=True)

    def unpublish_checkpoint_from_tinker_path(
        self, tinker_path: str | None = None, *, path: str | None = None
    ) -> APIFuture[None]:
        """Take that mark off."""
        return self._mark(_path_of(tinker_path, path), public=False)

    def _mark(self, path: str, *, public: bool) -> APIFuture[None]:
        async def ask() -> None:
            found = await self._call("GetCheckpoint", pb.GetCheckpointRequest(checkpoint_path=path))
            metadata = dict(found.checkpoint.user_metadata)
            metadata.pop(PUBLIC_MARK, None)
            if public:
                metadata[PUBLIC_MARK] = "true"
            mask = FieldMask(paths=["user_metadata"])
            request = pb.UpdateCheckpointRequest(
                checkpoint_path=path, update_mask=mask, user_metadata=metadata
            )
            await self._call("UpdateCheckpoint", request)

        return APIFuture(_loop.run(ask()))

    def set_checkpoint_ttl_from_tinker_path(
        self,
        tinker_path: str | None = None,
        ttl_seconds: int | None = None,
        *,
        path: str | None = None,
    ) -> APIFuture[None]:
        """Let a checkpoint live for this many seconds from now on; None means for ever."""
        ttl = _check.optional_ttl(ttl_seconds)
        return self._update(_path_of(tinker_path, path), "ttl", ttl=ttl)

    def _update(self, path: str, field: str, **values: Any) -> APIFuture[None]:
        mask = FieldMask(paths=[field])
        request = pb.UpdateCheckpointRequest(checkpoint_path=path, update_mask=mask, **values)
        return self._ask("UpdateCheckpoint", request, _nothing)

    def copy_weights(
        self,
        path: str,
        destination_project_id: str | None = None,
        *,
        destination_path: str | None = None,
        ttl_seconds: int | None = None,
        weights_access_token: str | None = None,
    ) -> APIFuture[str]:
        """Copy a checkpoint; the bytes are shared, each copy lives its own life.

        Args:
            path: The original.
            destination_project_id: Not supported; there are no projects.
            destination_path: The copy; None: the original's with `-copy` after it.
            ttl_seconds: Seconds until the copy is deleted; None: never.
            weights_access_token: Not supported.
        """
        if destination_project_id is not None:
            raise unsupported("destination_project_id", "there are no projects yet")
        if weights_access_token is not None:
            raise unsupported("weights_access_token", "there are no access tokens yet")
        source = stored(_check.text(path, "path"))
        target = f"{source}-copy" if destination_path is None else destination_path
        request = pb.CopyCheckpointRequest(
            source_checkpoint_path=source,
            destination_checkpoint_path=stored(_check.text(target, "destination_path")),
            ttl=_check.optional_ttl(ttl_seconds),
            request_id=str(uuid.uuid4()),  # sent again, it is still one copy
        )
        return self._ask("CopyCheckpoint", request, lambda r: shown(r.checkpoint.checkpoint_path))

    def download_checkpoint(self, path: str, folder: str | Path) -> APIFuture[Path]:
        """Download a checkpoint as a folder for `from_pretrained`.

        `PeftModel` reads the folder of an adapter; `AutoModelForCausalLM` and `AutoTokenizer` read
        that of a model that trained all weights.

        Args:
            path: The checkpoint, of either kind.
            folder: Where to; it is made. Files of the same names in it are replaced.
        """
        wanted = stored(_check.text(path, "path"))
        if not isinstance(folder, str | os.PathLike):
            raise _check.refuse("folder", f"expected a path, got {type(folder).__name__}")
        return APIFuture(_loop.run(download(self._connection, wanted, Path(folder))))

    # --- calls --------------------------------------------------------------------------------

    async def _call(self, method: str, request: Any) -> Any:
        async def attempt() -> Any:
            return await getattr(await self._connection.checkpoint(), method)(request)

        return await self._retrying(method, attempt)

    async def _retrying(self, what: str, attempt: Callable[[], Awaitable[T]]) -> T:
        return await self._connection.retrying(what, attempt, service=CHECKPOINT)

    def _ask(self, method: str, request: Any, read: Callable[[Any], T]) -> APIFuture[T]:
        async def ask() -> T:
            return read(await self._call(method, request))

        return APIFuture(_loop.run(ask()))


def _path_of(tinker_path: str | None, path: str | None = None) -> str:
    if tinker_path is not None and path is not None:
        raise _check.refuse("path", "tinker_path is given, too")
    return stored(_check.text(path if tinker_path is None else tinker_path, "tinker_path"))


def _nothing(_: Any) -> None:
    return None


def _run_from_pb(model: training_service_pb2.Model, checkpoints: list[Checkpoint]) -> TrainingRun:
    def newest(kind: str) -> Checkpoint | None:
        return next((c for c in checkpoints if c.checkpoint_type == kind), None)

    return TrainingRun(
        training_run_id=model.model_id,
        base_model=model.base_model,
        model_owner=model.owner,
        is_lora=model.WhichOneof("tuning") != "full_config",
        last_request_time=model.last_request_time.ToDatetime(UTC),
        corrupted=model.state == training_service_pb2.MODEL_STATE_LOST,
        lora_rank=model.lora_config.rank or None,
        last_checkpoint=newest("training"),
        last_sampler_checkpoint=newest("sampler"),
        user_metadata=dict(model.user_metadata),
    )
