"""One rank group at the other end of a stream: `AttachedRankGroup` is the `RankGroup`.

A command goes out with a number. Replies come back with that number: outputs or pieces first, then
`done` or `failed`. One command is under way at a time, since one turn is given at a time; only the
pieces of copied states may still come in meanwhile.
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet
from google.rpc.status_pb2 import Status

from tinsmith.internal.v1 import trainer_link_service_pb2 as pb
from tinsmithd import tracing
from tinsmithd.convert import types as convert
from tinsmithd.domain import AdamParams, BaseModelInfo, Tuning
from tinsmithd.errors import InvalidArgument, TinsmithError
from tinsmithd.files import is_plain_name
from tinsmithd.rpc.status import from_status
from tinsmithd.sizes import Work
from tinsmithd.text import bounded
from tinsmithd.training.call import BatchPlace, ComputeWork
from tinsmithd.training.ranks.claims import GroupClaim, memory_of, mismatch_of
from tinsmithd.training.ranks.interface import (
    Computed,
    ModelBroken,
    OnOutput,
    OnPiece,
    Pieces,
    RankGroupLost,
    RankMemory,
    StateInfo,
    Vitals,
)
from tinsmithd.training.ranks.replies import Replies

NONSENSE_BYTES_MAX = 200
"""Maximum bytes that are shown of a reply that makes no sense."""
STEP_COUNT_MAX = 1 << 53
"""Nobody can train a model for so long; one more step must still be an integer."""
MESSAGE_BYTES_MAX = 1024
"""Maximum bytes of a failure's message."""

OnReply = Callable[[pb.AttachRequest], Awaitable[None]]

_log = logging.getLogger(__name__)
_PLACES = {
    BatchPlace.WHOLE: pb.BATCH_PLACE_UNSPECIFIED,
    BatchPlace.FIRST: pb.BATCH_PLACE_FIRST,
    BatchPlace.LATER: pb.BATCH_PLACE_LATER,
}


class AttachedRankGroup:
    """A rank group that attached.

    Args:
        claim: What it says of itself.
        clock: Seconds, for `heard_s`.
    """

    def __init__(self, claim: GroupClaim, clock: Callable[[], float]) -> None:
        self._claim = claim
        self._clock = clock
        self._next_command_id = 1
        self._outgoing: asyncio.Queue[pb.AttachResponse | None] = asyncio.Queue(maxsize=16)
        self._replies: dict[int, Replies] = {}
        self._memory: Mapping[int, RankMemory] = {}
        self._lost: RankGroupLost | None = None
        self.gone = asyncio.Event()
        """Set when it will say nothing more."""
        self.task: asyncio.Task[Any] | None = None
        """Serves its stream."""
        self.leaving = False
        """Whether it said that somebody asked it to end: then no call is to blame."""
        self.heard_s = clock()
        """When it last said anything."""

    # --- the stream's side --------------------------------------------------------------------

    async def commands(self) -> AsyncIterator[pb.AttachResponse]:
        """The commands for rank 0, until the group is lost."""
        while (message := await self._outgoing.get()) is not None:
            yield message

    def answered(self, message: pb.AttachRequest) -> None:
        """Take in what rank 0 said.

        Raises:
            InvalidArgument: No rank says that.
        """
        self.heard_s = self._clock()
        if message.HasField("alive"):
            self._memory = memory_of(message.alive, self.world_size)
        self.leaving = self.leaving or message.HasField("leaving")
        if message.WhichOneof("content") is None and len(UnknownFieldSet(message)):
            return  # a later release says more than this one has to know
        replies = self._replies.get(message.command_id)
        if replies is not None:
            replies.put_nowait(message)

    def lose(self, why: str, *, blamed: bool = False) -> None:
        """The group is gone; everything that waits for it raises `RankGroupLost`."""
        if self._lost is not None:
            return
        self._lost = RankGroupLost(why, blamed=blamed)
        self.gone.set()
        for replies in self._replies.values():
            replies.put_nowait(None)
        while not self._outgoing.empty():
            self._outgoing.get_nowait()
        self._outgoing.put_nowait(None)

    # --- the lane's side: `RankGroup` ----------------------------------------------------------

    @property
    def info(self) -> BaseModelInfo:
        """The base model that the group holds."""
        return self._claim.info

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._claim.world_size

    @property
    def engine(self) -> str:
        """Name of the engine."""
        return self._claim.engine

    @property
    def identity(self) -> Mapping[str, str]:
        """All that the last bit of a result depends on, besides commands and compositions."""
        return self._claim.identity

    @property
    def work(self) -> Work:
        """What a token costs, as far as the group says."""
        return self._claim.work

    @property
    def vitals(self) -> Vitals:
        """How the group is now; another thread may ask."""
        now_s = self._clock()
        begun_s = min((each.begun_s for each in list(self._replies.values())), default=now_s)
        return Vitals(now_s - self.heard_s, now_s - begun_s, self._memory)

    @property
    def launch_token(self) -> str:
        """What the launcher that started it gave it; empty where there is none."""
        return self._claim.launch_token

    @property
    def release(self) -> str:
        """Its release; empty where it does not say it."""
        return self._claim.release

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
        batch: ComputeWork,
        *,
        place: BatchPlace,
        composition: bytes,
        on_output: OnOutput,
    ) -> Computed:
        """Forward, and backward too where asked."""
        command = pb.AttachResponse(model_id=model_id)
        # Filled in its place: to give it a finished message would copy all data.
        compute = command.compute
        compute.loss_fn.ParseFromString(batch.loss)
        compute.data.extend(batch.data)
        compute.backward, compute.place = batch.backward, _PLACES[place]
        compute.composition = composition

        expected = len(batch.data)

        async def take(message: pb.AttachRequest) -> None:
            add(message.outputs)

        def add(some: pb.DatumOutputs) -> None:
            nonlocal expected
            expected -= len(some.outputs)
            if expected < 0:
                raise self._nonsense("more outputs than data")
            for output in some.outputs:
                on_output(output)

        tokens = sum(batch.lengths)
        with tracing.span("ranks compute", tokens=tokens, data=expected, backward=batch.backward):
            done = await self._finish(await self._begin(command), "outputs", take)
        add(done.outputs)
        if expected:
            raise self._nonsense(f"{expected} outputs are missing")
        if not 0 <= done.engine_s < math.inf:
            raise self._nonsense(f"{done.engine_s} seconds of work")
        try:
            mismatch = mismatch_of(done, tokens)
        except InvalidArgument as error:
            raise self._nonsense(error.message) from error
        return Computed(
            dict(done.metrics), done.composition, done.non_finite, done.engine_s, mismatch
        )

    async def optim_step(self, model_id: str, adam: AdamParams) -> Mapping[str, float]:
        """Apply the pending gradients; returns the metrics."""
        command = pb.OptimStep(adam_params=convert.adam_to_pb(adam))
        return dict((await self._execute(model_id, optim_step=command)).metrics)

    async def copy_state(
        self, model_id: str, *, optimizer: bool, on_piece: OnPiece, deposit: str = ""
    ) -> Awaitable[StateInfo]:
        """Copy the model's state; what is returned sends it to `on_piece`, or leaves it."""
        copying = pb.CopyState(optimizer=optimizer, deposit=deposit)
        command = pb.AttachResponse(model_id=model_id, copy_state=copying)
        with tracing.span("ranks copy_state"):
            replies = await self._begin(command)
            first = await self._next(replies)
        case = first.WhichOneof("content")
        if case != "copied":
            self._replies.pop(replies.command_id)
            if case == "failed":
                raise self._failure(first.failed)
            raise self._nonsense(f"{case} before copied")

        async def send() -> StateInfo:
            pieces_count = 0

            async def take(name: str, data: bytes) -> None:
                nonlocal pieces_count
                pieces_count += 1
                await on_piece(name, data)

            try:
                done = await self._finish(replies, "piece", self._pieces_to(take))
            except RankGroupLost as error:
                # The ranks made the copy: another call ended them since then.
                raise RankGroupLost(str(error)) from error
            if done.deposited and (pieces_count or not deposit):
                raise self._nonsense("a file in a deposit that it was not given, or did not need")
            return self._state_info(done)

        return send()

    async def import_state(
        self,
        model_id: str,
        pieces: Pieces,
        *,
        optimizer: bool,
        create: bool,
        said: StateInfo | None,
    ) -> StateInfo:
        """Replace the model's state, or create the model from it."""
        command_id = self._take_command_id()
        for file_name, data in pieces:
            piece = pb.StatePiece(file_name=file_name, data=data)
            await self._send(pb.AttachResponse(command_id=command_id, piece=piece))
        command = pb.ImportState(optimizer=optimizer, create=create)
        if said is not None:
            claim = convert.tuning_to_pb(said.tuning)
            command.MergeFrom(pb.ImportState(**claim, step_count=said.step_count))
        return self._state_info(await self._execute(model_id, import_state=command))

    # --- one command --------------------------------------------------------------------------

    def _take_command_id(self) -> int:
        self._next_command_id += 1
        return self._next_command_id - 1

    async def _send(self, message: pb.AttachResponse) -> None:
        if self._lost is not None:
            raise self._lost_again()
        await self._outgoing.put(message)

    def _lost_again(self) -> RankGroupLost:
        # A new one each time: several callers raise it. Only the current command is to blame.
        assert self._lost is not None
        return RankGroupLost(str(self._lost))

    async def _execute(self, model_id: str, **command: Any) -> pb.Done:
        message = pb.AttachResponse(model_id=model_id, **command)
        with tracing.span(f"ranks {next(iter(command))}"):
            return await self._finish(await self._begin(message))

    async def _begin(self, command: pb.AttachResponse) -> Replies:
        replies = Replies(self._take_command_id(), self._clock())
        self._replies[replies.command_id] = replies
        command.command_id = replies.command_id
        if (place := tracing.here()) is not None:
            command.request_id, command.traceparent = place.call.request_id, tracing.traceparent()
        try:
            await self._send(command)
        except BaseException:
            del self._replies[replies.command_id]
            raise
        return replies

    async def _next(self, replies: Replies) -> pb.AttachRequest:
        message = await replies.get()
        if message is None:
            assert self._lost is not None
            raise RankGroupLost(str(self._lost), blamed=self._lost.blamed)
        return message

    async def _finish(
        self, replies: Replies, early: str = "", on_early: OnReply | None = None
    ) -> pb.Done:
        """Read the replies to a command up to the last one.

        Args:
            replies: They come in here.
            early: What may come before the last one.
            on_early: Takes it.
        """
        failure: Exception | None = None
        try:
            while True:
                message = await self._next(replies)
                case = message.WhichOneof("content")
                if case == "failed":
                    raise failure or self._failure(message.failed)
                if case == "done":
                    if failure is not None:
                        raise failure
                    return message.done
                if case != early or on_early is None:
                    raise self._nonsense(f"{case or 'nothing'} where it does not belong")
                if failure is None:
                    try:
                        await on_early(message)
                    except Exception as error:
                        failure = error  # the rest must be read all the same
        finally:
            # Nobody wants further replies to a command whose caller was cancelled.
            self._replies.pop(replies.command_id, None)

    def _failure(self, failed: pb.Failed) -> Exception:
        if failed.model_broken:
            return ModelBroken(bounded(failed.model_broken, MESSAGE_BYTES_MAX))
        try:
            error = from_status(Status.FromString(failed.status))
        except DecodeError:
            error = None
        return error or self._nonsense(f"a failure {failed.status[:NONSENSE_BYTES_MAX]!r}")

    def _state_info(self, done: pb.Done) -> StateInfo:
        try:
            tuning = convert.tuning_from_pb(done, "", 1 << 30)
        except TinsmithError as error:
            raise self._nonsense(error.message) from error
        if not 0 <= done.step_count <= STEP_COUNT_MAX:
            raise self._nonsense(f"{done.step_count} steps")
        deposited: dict[str, int] = {}
        for file in done.deposited:
            name, size_bytes = file.file_name, file.size_bytes
            if not is_plain_name(name) or size_bytes < 0 or name in deposited:
                raise self._nonsense(f"a file {name!r} of {size_bytes} bytes")
            deposited[name] = size_bytes
        return StateInfo(tuning, done.step_count, deposited)

    def _pieces_to(self, on_piece: OnPiece) -> OnReply:
        """Passes the pieces that rank 0 sends on."""

        async def take(message: pb.AttachRequest) -> None:
            name = message.piece.file_name
            if not is_plain_name(name):
                raise self._nonsense(f"a file {name!r}")
            await on_piece(name, message.piece.data)

        return take

    def _nonsense(self, what: str) -> RankGroupLost:
        """The group said what no group says: it loses its place, and the command may be why."""
        why = f"the rank group's reply makes no sense: {bounded(what, NONSENSE_BYTES_MAX)}"
        _log.error("%s", why)
        self.lose(why, blamed=True)
        return RankGroupLost(why, blamed=True)
