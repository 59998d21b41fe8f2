"""How a training client and its model end: deleted, kept for later, or left by an exception."""

from types import TracebackType
from typing import Any, Self

import grpc

from tinsmith import _loop
from tinsmith._connection import Connection
from tinsmith._lane import Lane
from tinsmith._twins import async_twins
from tinsmith.errors import unsupported
from tinsmith.futures import APIFuture
from tinsmith.types import UnloadModelResponse
from tinsmith.v1 import training_service_pb2 as pb


async def delete_model(connection: Connection, model_id: str) -> None:
    """Delete a model.

    Raises:
        NotFoundError: There is none (MODEL_NOT_FOUND).
    """
    request = pb.DeleteModelRequest(model_id=model_id)
    attempts = 0

    async def attempt() -> None:
        nonlocal attempts
        attempts += 1
        try:
            await connection.training().DeleteModel(request)
        except grpc.RpcError as error:
            # An attempt before this one may have deleted it, and its answer was lost.
            if attempts == 1 or error.code() is not grpc.StatusCode.NOT_FOUND:
                raise

    await connection.retrying("delete_model", attempt)


@async_twins("delete", "close", "unload_model", final=True)
class ModelLifetime:
    """What `TrainingClient` does with its model at the end. A context manager:

        with service.create_lora_training_client(base_model).result() as trainer:
            ...

    deletes the model when the block ends; its checkpoints stay. `trainer.close(keep=True)` inside
    the block keeps the model. An exception keeps it too, and says so in a note of its traceback.
    """

    model_id: str
    _connection: Connection
    _lane: Lane

    def delete(self) -> APIFuture[None]:
        """Delete the model, now; its checkpoints stay.

        Calls of it that were not answered yet fail with NotFoundError. This client can be used no
        more.

        Raises:
            NotFoundError: It was deleted before (MODEL_NOT_FOUND); from the future.
        """
        self._lane.close()
        return APIFuture(_loop.run(delete_model(self._connection, self.model_id)))

    def unload_model(self) -> APIFuture[UnloadModelResponse]:
        """`delete` under the name that Tinker's SDK had for it."""
        self._lane.close()

        async def unload() -> UnloadModelResponse:
            await delete_model(self._connection, self.model_id)
            return UnloadModelResponse(self.model_id)

        return APIFuture(_loop.run(unload()))

    def get_console_url(self) -> str:
        """Not supported."""
        raise unsupported("get_console_url", "there is no page for a model")

    def get_telemetry(self) -> None:
        """None: there is no telemetry."""

    def close(self, *, keep: bool = False) -> APIFuture[None]:
        """End this client: wait for the calls made so far, then delete the model unless it is kept.

        Checkpoints stay either way. A second `close`, or one after `delete`, does nothing.

        Args:
            keep: Leave the model on the cluster, to go on with later by its `model_id`. It moves to
                disk when its place is needed, and is deleted when nobody used it for
                `model_idle_ttl_s`.

        Raises:
            TinsmithError: A call that was still under way failed; then the model is kept, so that
                what it was to save is not lost. From the future.
        """
        if self._lane.closed:
            return APIFuture(_loop.run(_nothing()))
        self._lane.close()

        async def end() -> None:
            await self._lane.ended()
            if not keep:
                await delete_model(self._connection, self.model_id)

        return APIFuture(_loop.run(end()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close().result()
        else:
            self._leave(error)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            closed: Any = self.close()
            await closed
        else:
            self._leave(error)

    def _leave(self, error: BaseException) -> None:
        if not self._lane.closed:
            self._lane.close()
            error.add_note(
                f"model {self.model_id} is kept on the cluster, to go on with or to delete: "
                f"RestClient.delete_model({self.model_id!r})"
            )


async def _nothing() -> None:
    return None
