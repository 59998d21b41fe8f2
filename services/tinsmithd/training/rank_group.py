"""One rank group at the other end of a stream: `RankGroup` is the `Trainer`.

A command goes out with a number; answers come back with that number, any parts first, then `done`
or `failed`. One command is under way at a time, since the scheduler gives out one turn; only the
pieces of a snapshot may still be coming in meanwhile.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from tinsmith.internal.v1 import trainer_link_service_pb2 as pb
from tinsmithd import errors
from tinsmithd.convert import types as convert
from tinsmithd.domain import AdamParams, BaseModelInfo, Tuning
from tinsmithd.errors import Internal, Reason, TinsmithError
from tinsmithd.training.trainer import (
    CallPart,
    Computed,
    ModelBroken,
    OnPiece,
    OnResult,
    Pieces,
    StateInfo,
    TrainerLost,
)
from tinsmithd.training.works import ComputeWork

_PARTS = {
    CallPart.WHOLE: pb.CALL_PART_UNSPECIFIED,
    CallPart.FIRST: pb.CALL_PART_FIRST,
    CallPart.LATER: pb.CALL_PART_LATER,
}


class RankGroup:
    """A rank group that attached."""

    def __init__(self, hello: pb.Hello, clock: Callable[[], float]) -> None:
        self._info = convert.base_model_from_pb(hello.base_model)
        self._world_size = hello.world_size
        self._engine = hello.engine
        self._identity = dict(hello.identity)
        self.pid = hello.pid
        """Process id of rank 0 on its machine."""
        self._clock = clock
        self._next_command_id = 1
        self._outgoing: asyncio.Queue[pb.AttachResponse | None] = asyncio.Queue(maxsize=16)
        self._answers: dict[int, asyncio.Queue[pb.AttachRequest | None]] = {}
        self._lost: TrainerLost | None = None
        self.gone = asyncio.Event()
        """Set when nothing more will come of it."""
        self.task: asyncio.Task[Any] | None = None
        """Serves its stream."""
        self.leaving = False
        """It said that it was asked to end: no call is to blame."""
        self.heard_s = clock()
        """When it last said anything."""

    # --- the stream's side --------------------------------------------------------------------

    async def commands(self) -> AsyncIterator[pb.AttachResponse]:
        """What to send to rank 0, until the group is lost."""
        while (message := await self._outgoing.get()) is not None:
            yield message

    def answered(self, message: pb.AttachRequest) -> None:
        """Take in what rank 0 said."""
        self.heard_s = self._clock()
        self.leaving = self.leaving or message.HasField("leaving")
        answers = self._answers.get(message.command_id)
        if answers is not None:
            answers.put_nowait(message)

    def lose(self, why: str, *, blamed: bool = False) -> None:
        """The group is gone; everything that waits for it raises `TrainerLost`."""
        if self._lost is not None:
            return
        self._lost = TrainerLost(why, blamed=blamed)
        self.gone.set()
        for answers in self._answers.values():
            answers.put_nowait(None)
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

    @property
    def identity(self) -> Mapping[str, str]:
        """All that the last bit of a result depends on, besides commands and plans."""
        return self._identity

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
        work: ComputeWork,
        *,
        part: CallPart,
        plan: bytes,
        on_result: OnResult,
    ) -> Computed:
        """Forward, and backward too where asked."""
        command = pb.AttachResponse(model_id=model_id)
        # Filled in its place: a message that is given to another one is copied with all its data.
        compute = command.compute
        compute.loss_fn.ParseFromString(work.loss)
        compute.data.extend(work.data)
        compute.backward, compute.part, compute.plan = work.backward, _PARTS[part], plan

        async def take(message: pb.AttachRequest) -> None:
            for output in message.results.outputs:
                on_result(output)

        done = await self._finish(await self._begin(command), take)
        for output in done.results.outputs:
            on_result(output)
        return Computed(dict(done.metrics), done.plan, done.non_finite, done.engine_s)

    async def optim_step(self, model_id: str, adam: AdamParams) -> Mapping[str, float]:
        """Apply the waiting gradients; returns the metrics."""
        command = pb.OptimStep(adam_params=convert.adam_to_pb(adam))
        return dict((await self._execute(model_id, optim_step=command)).metrics)

    async def export_state(self, model_id: str, *, optimizer: bool, on_piece: OnPiece) -> StateInfo:
        """Send the model's state files, piece by piece."""
        command = pb.ExportState(optimizer=optimizer)
        take = _pieces_to(on_piece)
        return _state_info(await self._execute(model_id, take, export_state=command))

    async def snapshot(self, model_id: str, on_piece: OnPiece) -> Awaitable[StateInfo]:
        """Copy the model's state; what is returned sends it to `on_piece`."""
        command = pb.AttachResponse(model_id=model_id, snapshot=pb.Snapshot())
        answers = await self._begin(command)
        first = await self._next(answers)
        if first.WhichOneof("content") == "failed":
            self._answers.pop(answers.command_id)
            raise _failure(first.failed)

        async def send() -> StateInfo:
            return _state_info(await self._finish(answers, _pieces_to(on_piece)))

        return send()

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
        if self._lost is not None:
            raise self._lost_again()
        await self._outgoing.put(message)

    def _lost_again(self) -> TrainerLost:
        # A new one each time: several callers raise it. Only the call under way is to blame.
        assert self._lost is not None
        return TrainerLost(str(self._lost))

    async def _execute(self, model_id: str, on_part: Any = None, **command: Any) -> pb.Done:
        message = pb.AttachResponse(model_id=model_id, **command)
        return await self._finish(await self._begin(message), on_part)

    async def _begin(self, command: pb.AttachResponse) -> "_Answers":
        answers = _Answers(self._take_command_id())
        self._answers[answers.command_id] = answers
        command.command_id = answers.command_id
        try:
            await self._send(command)
        except BaseException:
            del self._answers[answers.command_id]
            raise
        return answers

    async def _next(self, answers: "_Answers") -> pb.AttachRequest:
        message = await answers.get()
        if message is None:
            assert self._lost is not None
            raise TrainerLost(str(self._lost), blamed=self._lost.blamed)
        return message

    async def _finish(self, answers: "_Answers", on_part: Any) -> pb.Done:
        """Read the answers of a command up to its last one."""
        failure: Exception | None = None
        try:
            while True:
                message = await self._next(answers)
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
        finally:
            # What still comes of a command whose caller was cancelled is of no interest.
            self._answers.pop(answers.command_id, None)


class _Answers(asyncio.Queue[pb.AttachRequest | None]):
    """What rank 0 says of one command; None when it is gone."""

    def __init__(self, command_id: int) -> None:
        super().__init__()
        self.command_id = command_id


def _pieces_to(on_piece: OnPiece) -> Callable[[pb.AttachRequest], Awaitable[None]]:
    """Passes the pieces that rank 0 sends on."""

    async def take(message: pb.AttachRequest) -> None:
        await on_piece(message.piece.file_name, message.piece.data)

    return take


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
