"""The simulator without faults: many small calls on one Training server whose costs are given.

The rules are those of production. What a process does takes no virtual time there, so what it costs
is added: a call waits for the server's one processor before it is taken in, a commit for the disk,
a command for the ranks.
"""

import asyncio
import gc
import hashlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sim import engine
from sim.disk import SimDisk
from sim.network import Connection
from sim.ranks import RankGroup
from sim.server import CallRequest, CreateRequest, Request, Server
from sim.world import World
from tinsmithd.config import TrainingConfig
from tinsmithd.domain import AdamParams, LoraConfig
from tinsmithd.training.call import ComputeWork, StepWork, StoredAnswer, Work, encode_work
from tinsmithd.training.models import NewModel
from tinsmithd.training.server import limits_of


@dataclass(frozen=True)
class Costs:
    """What things take, seconds.

    Attributes:
        call_s: Of the server's processor, for a call.
        commit_s: A commit, whatever is in it.
        write_s: Each write in it.
        command_s: A command of the ranks that computes nothing, there and back.
    """

    call_s: float
    commit_s: float
    write_s: float
    command_s: float


class _Disk(SimDisk):
    def __init__(self, world: "BusyWorld") -> None:
        super().__init__(world)
        self._costs = world.costs

    async def pause(self) -> None:
        await asyncio.sleep(0)

    async def pause_sync(self) -> None:
        writes = sum(len(found) for found in self.pending if not isinstance(found, int))
        await asyncio.sleep(self._costs.commit_s + writes * self._costs.write_s)


class _Ranks(RankGroup):
    world: "BusyWorld"

    async def step(self) -> None:
        # A command has two or three of these moments.
        await asyncio.sleep(self.world.costs.command_s / 2)


class _Server(Server):
    world: "BusyWorld"
    _free_s = 0.0

    def take(self, request: Request, connection: Connection) -> None:
        now_s = self.world.loop.time()
        self._free_s = max(self._free_s, now_s) + self.world.costs.call_s
        self.world.network.at(self._free_s, super().take, request, connection)


class BusyWorld(World):
    """One run.

    Args:
        costs: What things take.
        models: Number of models that the calls are of, by turns.
        per_second: Calls in a second.
        seconds: How long they come.

    Attributes:
        took_s: What each call took, from when it was sent.
        over_s: When the last one was answered, from when the first was sent.
    """

    def __init__(self, costs: Costs, models: int, per_second: float, seconds: float) -> None:
        self.costs = costs
        super().__init__(0)
        self.limits = limits_of(TrainingConfig())
        self.snapshot_slow_s = 0.0
        self.disk = _Disk(self)
        self.took_s: list[float] = []
        self.over_s = 0.0
        self._models = models
        self._per_second, self._seconds = per_second, seconds
        self.network.delay_s = lambda: 1e-4  # type: ignore[method-assign]

    def log(self, *event: object) -> None:
        """Nobody reads it."""

    def start_server(self) -> None:
        """See `World`."""
        self.server = _Server(self, "server")
        self.server.start()

    def start_ranks(self) -> None:
        """See `World`."""
        self.group = _Ranks(self, "ranks", dict(self.identity))
        self.attach()

    async def _main(self) -> None:
        self.start_server()
        self.start_ranks()
        while self.server is None or self.server.link is None:
            await asyncio.sleep(0.1)
        ids = [await self._created(number) for number in range(self._models)]
        begun_s = self.loop.time() + 1.0
        calls = []
        for number in range(int(self._per_second * self._seconds)):
            await asyncio.sleep(begun_s + number / self._per_second - self.loop.time())
            place, kind = divmod(number, 2)
            seq_id = 2 * (place // len(ids)) + kind + 1
            calls.append(self.spawn(self._call(ids[place % len(ids)], seq_id)))
        await asyncio.gather(*calls)
        self.over_s = self.loop.time() - begun_s

    async def _created(self, number: int) -> str:
        new = NewModel("base", LoraConfig(seed=number), None, False, {}, f"r{number}", b"")
        answer = await self.network.send(CreateRequest(new)).answer
        assert answer.error is None, answer.error
        return str(answer.value["model_id"])

    async def _call(self, model_id: str, seq_id: int) -> None:
        work: Work = StepWork(AdamParams())
        if seq_id % 2:
            work = ComputeWork(b"loss", [engine.datum(engine.NORMAL, seq_id, 0)], [5], True)
        digest = hashlib.sha256(encode_work(work)).digest()
        sent_s = self.loop.time()
        nbytes = work.nbytes if isinstance(work, ComputeWork) else 0
        request = CallRequest(model_id, seq_id, digest, work, nbytes)
        answer: StoredAnswer = await self.network.send(request).answer
        assert answer.error is None, answer.error
        self.took_s.append(self.loop.time() - sent_s)


def run(
    costs: Costs, models: int, per_second: float, seconds: float
) -> tuple[Sequence[float], float]:
    """One run; what each call took, and when the last was answered, seconds."""
    log = logging.getLogger("tinsmithd")
    level: Any = log.level
    hook = sys.unraisablehook
    log.setLevel(logging.CRITICAL)
    world = BusyWorld(costs, models, per_second, seconds)
    try:
        world.run()
        assert not world.failures, world.failures[:3]
        return world.took_s, world.over_s
    finally:
        log.setLevel(level)
        sys.unraisablehook = lambda unraisable: None  # what is destroyed now says nothing
        del world
        gc.collect()
        sys.unraisablehook = hook
