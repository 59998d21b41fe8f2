"""One process of the Training server: the production rules, put together as `server.py` does it."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sim import engine
from sim.checkpoints import SimCheckpointClient, SimStaging
from sim.disk import SimStore, Unclaimable
from sim.loop import Process
from sim.ranks import SimRankGroup
from sim.snapshots import SimSnapshotStore
from tinsmithd.errors import InvalidArgument, Reason, TinsmithError, Unavailable
from tinsmithd.training.call import Answer, Call, ComputeWork, RefusedWork, Work
from tinsmithd.training.journal import Fenced, Journal, StoreDamaged
from tinsmithd.training.lane import LaneLimits
from tinsmithd.training.models import (
    CallLimits,
    Checkpoints,
    Copies,
    ModelLimits,
    Models,
    NewModel,
    SeatLimits,
    SnapshotRule,
)

if TYPE_CHECKING:
    import random

    from sim.network import Connection
    from sim.world import World

GRACE_S = 2.0


@dataclass(frozen=True)
class CallRequest:
    """A numbered call; `work` None is one that cannot be read."""

    model_id: str
    seq_id: int
    digest: bytes
    work: Work | None
    nbytes: int = 0
    acknowledge: bool = False


@dataclass(frozen=True)
class AnswerRequest:
    """The answer of a call that was accepted."""

    call: CallRequest


@dataclass(frozen=True)
class Accepted:
    """A call is written down."""


@dataclass(frozen=True)
class CreateRequest:
    """A new model."""

    new: NewModel


@dataclass(frozen=True)
class DeleteRequest:
    """A model is to go."""

    model_id: str


Request = CallRequest | AnswerRequest | CreateRequest | DeleteRequest


def limits(rng: "random.Random", seats_rng: "random.Random") -> ModelLimits:
    """Settings of one run."""
    lane = LaneLimits(
        lane_calls_max=rng.choice([3, 8, 64]),
        lane_bytes_max=rng.choice([200, 2000, 100_000]),
        gap_wait_s_max=rng.choice([1.0, 10.0]),
        answers_kept_max=rng.choice([8, 12]),
        answer_bytes_kept_max=100_000,
        call_attempts_max=rng.choice([2, 2, 3]),
        snapshot_idle_s=seats_rng.choice([0.1, 1.0, 30.0]),
    )
    rule = SnapshotRule(rng.choice([1, 1, 2, 3, 100]), rng.choice([3.0, 30.0, 600.0]))
    calls = CallLimits(rng.choice([6, 12, 1000]), 1_000_000, rule)
    # Often more models than there are seats, and in some runs with hardly any rest between moves.
    choice = seats_rng.choice
    seats = SeatLimits(choice([1, 2, 100, 100]), choice([0.0, 0.2]), choice([0.3, 3.0]))
    return ModelLimits(100, 1e9, seats, lane, calls)


def seats_for_all(found: ModelLimits) -> ModelLimits:
    """The same with a seat for each model."""
    return replace(found, seats=SeatLimits(100))


class Server:
    """One process, from its start to its end.

    Attributes:
        up: It takes requests.
        failed: It could not start, or ended by itself.
    """

    def __init__(self, world: "World", name: str) -> None:
        self.world = world
        self.name = name
        self.process = Process(world.loop, name)
        self.up = False
        self.link: SimRankGroup | None = None
        self.connections: list[Connection] = []
        client: Any = SimCheckpointClient(world.checkpoints)
        self.client = client
        self.journal = Journal(SimStore(world.disk))
        checkpoints = Checkpoints(client, SimStaging(), Copies(world.copies_max))
        self.models = Models(
            world.limits,
            checkpoints,
            self.journal,
            SimSnapshotStore(world.disk),
            world.new_model_id,
        )

    def start(self) -> None:
        """Begin."""
        self.process.start(self._main(), self.name)

    async def _main(self) -> None:
        try:
            contents = await self.journal.open()
            self.client.writer_name = contents.cluster_id
            self.client.writer_epoch = contents.epoch
            await self.models.recall(
                *(contents.models, contents.deleted, contents.starts, contents.used_ids)
            )
            self.up = True
            self.world.server_is_up(self)
            await self.journal.failed()
        except Fenced:
            self.world.count("servers fenced")
        except Unclaimable:
            self.world.count("starts refused by the disk")
        except StoreDamaged as error:
            self.world.fail(f"{self.name} does not start: {error}")
        except Exception as error:
            self.world.fail(f"{self.name} ends with {error!r}", error)
        self.world.server_exits(self)

    def stop_gracefully(self) -> None:
        """End as on SIGTERM."""
        self.up = False
        self.process.start(self._stop(), f"{self.name} stops")

    async def _stop(self) -> None:
        await self.models.stop(GRACE_S)
        self.world.detach(self, "the Training server stops")
        await self.journal.close()
        self.world.server_exits(self)

    def wake_suspended(self) -> None:
        """Call each model that is on disk, which changes nothing but brings it back."""
        self.process.start(self._wake_suspended(), f"{self.name} wakes models")

    async def _wake_suspended(self) -> None:
        data = [engine.datum(engine.NORMAL, 0, 0)]
        for model in self.models.list():
            if model.lane.suspended:
                work = ComputeWork(b"loss", data, [1], backward=False)
                await self.models.wake(model)
                self.models.submit(model, Call(0, b"", work))

    # --- requests -----------------------------------------------------------------------------

    def take(self, request: Request, connection: "Connection") -> None:
        """A request has arrived."""
        if not self.process.alive or not self.up:
            connection.refused()
            return
        self.process.call(self._begin, request, connection)

    def _begin(self, request: Request, connection: "Connection") -> None:
        connection.server = self
        self.connections.append(connection)
        connection.handler = self.process.start(self._serve(request, connection))

    async def _serve(self, request: Request, connection: "Connection") -> None:
        try:
            async for message in self._handle(request):
                connection.send(message)
        except TinsmithError as error:
            connection.send(error)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self.world.fail(f"a request ends with {error!r}", error)

    async def _handle(self, request: Request) -> AsyncIterator[Any]:
        """The outputs of an answer as bytes, then its value."""
        match request:
            case CreateRequest():
                model = await self.models.create(request.new)
                yield {"model_id": model.model_id}
            case DeleteRequest():
                await self.models.delete(request.model_id)
                yield {}
            case CallRequest():
                model = self.models.get(request.model_id)
                await self.models.wake(model)
                work = request.work
                if work is None:
                    work = RefusedWork(InvalidArgument("adam_params", "is not one"))
                call = Call(
                    *(request.seq_id, request.digest, work, request.nbytes, request.acknowledge)
                )
                answer = self.models.submit(model, call)
                if request.acknowledge and await answer.accepted():
                    yield Accepted()
                async for message in _messages(answer):
                    yield message
            case AnswerRequest():
                asked = request.call
                model = self.models.get(asked.model_id)
                await self.models.wake(model)
                answer = self.models.answer(model, asked.seq_id, asked.digest)
                async for message in _messages(answer):
                    yield message


async def _messages(answer: Answer) -> AsyncIterator[Any]:
    async for output in answer.outputs():
        yield output
    yield dict(await answer.value())


def tight(found: ModelLimits, journal_bytes_max: int) -> ModelLimits:
    """The same with little room in the journal, and snapshots that make some."""
    calls = replace(found.calls, journal_bytes_max=journal_bytes_max)
    return replace(found, calls=calls, lane=replace(found.lane, lane_bytes_max=100_000))


def lost_connection() -> Unavailable:
    """What a caller sees of a connection that broke."""
    return Unavailable("the connection broke", Reason.SHUTTING_DOWN)
