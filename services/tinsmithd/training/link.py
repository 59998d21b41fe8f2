"""The Training server's end of the stream that rank 0 holds open: `RankGroup` is the `Trainer`.

A command goes out with a number; answers come back with that number, any parts first, then `done`
or `failed`. One command is under way at a time, since the scheduler gives out one turn.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import grpc

from tinsmith.internal.v1 import trainer_link_service_pb2 as pb
from tinsmith.internal.v1.trainer_link_service_pb2_grpc import TrainerLinkServiceServicer
from tinsmithd import errors
from tinsmithd.convert import types as convert
from tinsmithd.convert.tensors import array_from_pb
from tinsmithd.domain import AdamParams, BaseModelInfo, Datum, LossFn, Tuning
from tinsmithd.errors import Internal, Reason, TinsmithError
from tinsmithd.training.models import Models
from tinsmithd.training.trainer import (
    CallPart,
    ModelBroken,
    OnPiece,
    OnResult,
    Pieces,
    StateInfo,
    TrainerLost,
)

_PARTS = {
    CallPart.WHOLE: pb.CALL_PART_UNSPECIFIED,
    CallPart.FIRST: pb.CALL_PART_FIRST,
    CallPart.LATER: pb.CALL_PART_LATER,
}

_log = logging.getLogger(__name__)


class RankGroup:
    """An attached rank group."""

    def __init__(self, hello: pb.Hello) -> None:
        self._info = convert.base_model_from_pb(hello.base_model)
        self._world_size = hello.world_size
        self._engine = hello.engine
        self._next_command_id = 1
        self._outgoing: asyncio.Queue[pb.AttachResponse | None] = asyncio.Queue(maxsize=16)
        self._answers: asyncio.Queue[pb.AttachRequest | None] = asyncio.Queue()
        self._lost = ""

    # --- the stream's side --------------------------------------------------------------------

    async def commands(self) -> AsyncIterator[pb.AttachResponse]:
        """What to send to rank 0, until the group is lost."""
        while (message := await self._outgoing.get()) is not None:
            yield message

    def answered(self, message: pb.AttachRequest) -> None:
        """Take in what rank 0 said."""
        self._answers.put_nowait(message)

    def lose(self, why: str) -> None:
        """The group is gone; everything that waits for it raises `TrainerLost`."""
        if self._lost:
            return
        self._lost = why
        self._answers.put_nowait(None)
        while not self._outgoing.empty():
            self._outgoing.get_nowait()
        self._outgoing.put_nowait(None)

    # --- the scheduler's side: `Trainer` ------------------------------------------------------

    @property
    def info(self) -> BaseModelInfo:
        """The base model that the group holds."""
        return self._info

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._world_size

    @property
    def engine(self) -> str:
        """Name of the engine."""
        return self._engine

    async def create_model(self, model_id: str, tuning: Tuning) -> None:
        """Add a model."""
        command = pb.CreateModel(**convert.tuning_to_pb(tuning))
        await self._execute(model_id, create_model=command)

    async def delete_model(self, model_id: str) -> None:
        """Drop a model; an unknown one is no error."""
        await self._execute(model_id, delete_model=pb.DeleteModel())

    async def compute(
        self,
        model_id: str,
        data: Sequence[Datum],
        loss_fn: LossFn,
        *,
        backward: bool,
        part: CallPart,
        on_result: OnResult,
    ) -> Mapping[str, float]:
        """Forward, and backward too where asked; returns the metrics."""
        command = pb.Compute(
            loss_fn=convert.loss_fn_to_pb(loss_fn),
            data=[convert.datum_to_pb(datum) for datum in data],
            backward=backward,
            part=_PARTS[part],
        )

        async def take(message: pb.AttachRequest) -> None:
            for output in message.results.outputs:
                found = output.loss_fn_outputs
                on_result({name: array_from_pb(found[name], name, "float") for name in found})

        done = await self._execute(model_id, take, compute=command)
        return dict(done.metrics)

    async def optim_step(self, model_id: str, adam: AdamParams) -> Mapping[str, float]:
        """Apply the waiting gradients; returns the metrics."""
        command = pb.OptimStep(adam_params=convert.adam_to_pb(adam))
        return dict((await self._execute(model_id, optim_step=command)).metrics)

    async def export_state(self, model_id: str, *, optimizer: bool, on_piece: OnPiece) -> StateInfo:
        """Send the model's state files, piece by piece."""

        async def take(message: pb.AttachRequest) -> None:
            await on_piece(message.piece.file_name, message.piece.data)

        command = pb.ExportState(optimizer=optimizer)
        return _state_info(await self._execute(model_id, take, export_state=command))

    async def import_state(
        self,
        model_id: str,
        pieces: Pieces,
        *,
        optimizer: bool,
        create: bool,
    ) -> StateInfo:
        """Replace the model's state, or create the model from it."""
        command_id = self._take_command_id()
        for file_name, data in pieces:
            piece = pb.StatePiece(file_name=file_name, data=data)
            await self._send(pb.AttachResponse(command_id=command_id, piece=piece))
        command = pb.ImportState(optimizer=optimizer, create=create)
        return _state_info(await self._execute(model_id, import_state=command))

    # --- one command --------------------------------------------------------------------------

    def _take_command_id(self) -> int:
        self._next_command_id += 1
        return self._next_command_id - 1

    async def _send(self, message: pb.AttachResponse) -> None:
        if self._lost:
            raise TrainerLost(self._lost)
        await self._outgoing.put(message)

    async def _execute(self, model_id: str, on_part: Any = None, **command: Any) -> pb.Done:
        command_id = self._take_command_id()
        await self._send(pb.AttachResponse(command_id=command_id, model_id=model_id, **command))
        failure: Exception | None = None
        while True:
            message = await self._answers.get()
            if message is None or self._lost:
                self._answers.put_nowait(None)  # for whoever asks next
                raise TrainerLost(self._lost)
            if message.command_id != command_id:
                continue  # of a command whose caller was cancelled
            case = message.WhichOneof("content")
            if case == "failed":
                raise failure or _failure(message.failed)
            if case == "done":
                if failure is not None:
                    raise failure
                return message.done
            if failure is None:
                try:
                    await on_part(message)
                except Exception as error:
                    failure = error  # the rest of the parts must be read all the same


def _failure(failed: pb.Failed) -> Exception:
    if failed.model_broken:
        return ModelBroken(failed.message)
    cls = getattr(errors, failed.error, None)
    if cls is None or cls is Internal or not issubclass(cls, TinsmithError):
        return Internal()
    if cls is errors.InvalidArgument:
        error: TinsmithError = cls("", failed.message, Reason(failed.reason))
    else:
        error = cls(failed.message, Reason(failed.reason))
    error.field = failed.field
    return error


def _state_info(done: pb.Done) -> StateInfo:
    return StateInfo(convert.tuning_from_pb(done, "", 1 << 30), done.step_count)


class TrainerLinkServicer(TrainerLinkServiceServicer):
    """Takes rank 0's stream and makes it the trainer of `models`."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._group: RankGroup | None = None

    async def Attach(  # type: ignore[override]  # grpc.aio's form of the method
        self, request_iterator: AsyncIterator[pb.AttachRequest], context: Any
    ) -> AsyncIterator[pb.AttachResponse]:
        """Serve one rank group until its stream ends."""
        group = await self._hello(request_iterator)
        if group is None:
            return
        if self._group is not None:
            _log.warning("a new rank group takes the place of the one before")
            self._group.lose("another rank group took its place")
            self._models.detach(self._group)
        self._group = group
        info = group.info
        _log.info(
            "trainer attached: %s, %d rank(s), %s engine, %s",
            *(info.name, group.world_size, group.engine, info.dtype),
        )
        self._models.attach(group)
        reader = asyncio.create_task(self._read(group, request_iterator))
        try:
            async for command in group.commands():
                yield command
        finally:
            reader.cancel()
            group.lose("the rank group's connection ended")
            self._models.detach(group)
            if self._group is group:
                self._group = None
            _log.warning("trainer detached")

    def close(self) -> None:
        """Let the attached group go."""
        if self._group is not None:
            self._group.lose("the Training server stops")

    async def _hello(self, requests: AsyncIterator[pb.AttachRequest]) -> RankGroup | None:
        async for request in requests:
            if request.WhichOneof("content") == "loading":
                _log.info("trainer: %s", request.loading.message)
                self._models.progress = request.loading.message
            elif request.WhichOneof("content") == "hello":
                return RankGroup(request.hello)
        return None

    async def _read(self, group: RankGroup, requests: AsyncIterator[pb.AttachRequest]) -> None:
        try:
            async for request in requests:
                group.answered(request)
        except (grpc.RpcError, TinsmithError) as error:
            group.lose(f"the rank group's stream broke: {error}")
        else:
            group.lose("the rank group ended")
