"""One run: everything around the production code, and the checks at its end."""

import asyncio
import contextvars
import gc
import hashlib
import logging
import random
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from sim import audit
from sim.checkpoints import SimCheckpoints
from sim.clients import TIGHT_BYTES, ModelUser
from sim.disk import SimDisk
from sim.loop import PROCESS, Hang, Killed, Process, SimLoop
from sim.nemesis import Nemesis
from sim.network import Network
from sim.ranks import RankGroup, SimRankGroup
from sim.server import Server, limits, tight
from tinsmithd import failpoints
from tinsmithd.training.journal import AddCall, ForgetCalls, UnparkCalls, Write

IDENTITY = {"base_model": "base", "dtype": "float32", "engine": "e1"}


@dataclass
class Result:
    """What came of one run."""

    seed: int
    failures: list[str]
    trace_hash: str
    counts: Counter[str] = field(default_factory=Counter)
    checks: Counter[str] = field(default_factory=Counter)
    trace: list[str] = field(default_factory=list)


class World:
    """Everything of one run.

    Attributes:
        server: The process that has the service's address; None while there is none.
        group: The rank group that is at work, or about to be.
        blames: How often a call was to blame for the death of its ranks.
        tight: There is little room in the journal.
        wrong_in: After so many replayed data ranks give a wrong result; 0 for never.
        pace_s: Longest pause between two calls of a client.
        snapshot_slow_s: How much longer than usual a piece of a snapshot takes.
        freed: Model and number of each call that was written down and took no effect after all.
    """

    def __init__(self, seed: int, *, tracing: bool = False) -> None:
        self.seed = seed
        self.failures: list[str] = []
        self.counts: Counter[str] = Counter()
        self.checks: Counter[str] = Counter()
        self.trace: list[str] = []
        self._tracing = tracing
        self._hash = hashlib.sha256()
        self.loop = SimLoop(self.fail)
        self.context = contextvars.Context()
        self._owned: list[tuple[Process, asyncio.Task[Any]]] = []
        rng = self.stream("world")
        self.rng = rng
        self.limits = limits(rng, self.stream("seats"))
        self.copies_max = self.stream("copies").choice([1, 2, 2])
        self.tight = rng.random() < 0.1
        if self.tight:
            self.limits = tight(self.limits, TIGHT_BYTES)
        self.pace_s = rng.choice([0.1, 0.5, 2.0])
        self.snapshot_slow_s = rng.choice([0.0, 0.0, 0.1, 0.5])
        self.disk = SimDisk(self)
        self.checkpoints = SimCheckpoints(self)
        self.network = Network(self)
        self.server: Server | None = None
        self.group: RankGroup | None = None
        self.identity = dict(IDENTITY)
        self.blames: Counter[str] = Counter()
        self.ruined: set[str] = set()
        self.freed: set[tuple[str, int]] = set()
        self._numbers: dict[tuple[str, int], int] = {}
        self.wrong_in = 0
        self._model_count = self._server_count = self._group_count = 0
        self.users: list[ModelUser] = []
        self.nemesis = Nemesis(self)

    # --- for everybody ------------------------------------------------------------------------

    def stream(self, name: str) -> random.Random:
        """Random numbers of one part of the world."""
        return random.Random(f"{self.seed} {name}")

    def log(self, *event: object) -> None:
        """Write down what happened."""
        line = f"{self.loop.time():.6f} {event!r}"
        self._hash.update(line.encode())
        if self._tracing:
            self.trace.append(line)

    def count(self, what: str, times: int = 1) -> None:
        """Count something that was done to the system, or that it did."""
        self.counts[what] += times

    def checked(self, what: str) -> None:
        """Count something that was found to be true."""
        self.checks[what] += 1

    def fail(self, what: str, error: BaseException | None = None) -> None:
        """Something is wrong."""
        self.log("FAILURE", what)
        if error is not None and self._tracing:
            what += "\n" + "".join(traceback.format_exception(error))
        self.failures.append(what)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Begin a task of the world, which no process takes along when it dies."""
        return self.loop.create_task(work, context=self.context.copy())

    def own(self, process: Process, task: asyncio.Task[Any]) -> None:
        """What the system does for a process ends with it."""
        self._owned.append((process, task))
        if len(self._owned) > 200:
            self._owned = [pair for pair in self._owned if not pair[1].done()]

    def new_model_id(self) -> str:
        """The next one."""
        self._model_count += 1
        return f"m{self._model_count}"

    def written(self, epoch: int, writes: Sequence[Write]) -> None:
        """A transaction was written to the journal."""
        self.log("write", epoch, [type(write).__name__ for write in writes])
        self.nemesis.wrote()
        for write in writes:
            if isinstance(write, AddCall):
                self._numbers[write.model_id, write.position] = write.seq_id
            elif isinstance(write, ForgetCalls):
                places = [(write.model_id, position) for position in write.positions]
                self.freed |= {(write.model_id, self._numbers.get(at, 0)) for at in places}
            elif isinstance(write, UnparkCalls):
                self.freed |= {(write.model_id, seq_id) for seq_id in write.seq_ids}
        if epoch != self.disk.epoch:
            self.fail(f"a process of epoch {epoch} writes in epoch {self.disk.epoch}")

    def goes_wrong(self, model_id: str) -> bool:
        """Whether ranks that make a call again give another result this time."""
        if self.wrong_in:
            self.wrong_in -= 1
            if not self.wrong_in:
                self.count("wrong results")
                self.ruined.add(model_id)
                return True
        return False

    def may_be_lost(self, model_id: str) -> bool:
        """Whether a model may be lost for good."""
        return model_id in self.ruined

    # --- processes ----------------------------------------------------------------------------

    def start_server(self) -> None:
        """Start a process; it has the address from now on."""
        self._server_count += 1
        self.server = Server(self, f"server{self._server_count}")
        self.log("start", self.server.name)
        self.server.start()

    def server_is_up(self, server: Server) -> None:
        """A process has read the journal and serves."""
        self.log("up", server.name)
        self.later(self.rng.uniform(0.01, 0.5), self.attach)

    def server_exits(self, server: Server) -> None:
        """A process ends by itself."""
        self.kill_server(server, "exits")

    def kill_server(self, server: Server, why: str = "killed") -> None:
        """A process is gone, at once."""
        if not server.process.alive:
            return
        self.log(why, server.name, server.process.steps)
        server.process.kill()
        self.count("models suspended", server.models.place.counts.suspended)
        for process, task in self._owned:
            if process is server.process:
                task.cancel()
        for connection in server.connections:
            if self.rng.random() < 0.7:
                connection.refused()
        if server.link is not None:
            server.link.lose("the server is gone")
            if self.group is not None and self.group.link is server.link:
                self.group.detach()
        if self.server is server:
            self.server = None
            delay_s = self.rng.choice([0.01, 0.3, 3.0])
            self.later(delay_s, lambda: self.server or self.start_server())

    def replace_server(self) -> None:
        """Start another process although the one that has the address may live."""
        old, self.server = self.server, None
        if old is not None and old.link is not None and self.group is not None:
            if self.group.link is old.link:
                self.group.detach()
            old.link.lose("the connection broke")
            old.process.call(old.models.place.detach, old.link)
        self.start_server()

    # --- ranks --------------------------------------------------------------------------------

    def start_ranks(self) -> None:
        """Start a rank group."""
        self._group_count += 1
        name = f"g{self._group_count}"
        self.group = RankGroup(self, name, dict(self.identity))
        self.attach()

    def attach(self) -> None:
        """Bring the rank group and the server together, where both are there."""
        server, group = self.server, self.group
        if server is None or group is None or not server.up or not group.alive or group.stopped:
            return
        if group.link is None:
            server.process.call(self._attach, server, group)

    def _attach(self, server: Server, group: RankGroup) -> None:
        if self.server is not server or self.group is not group or not group.alive:
            return
        if group.link is not None or server.link is not None or not server.up:
            return
        link: Any = SimRankGroup(group)
        self.log("attach", group.name, server.name)
        group.attach(link)
        server.link = link
        server.models.place.attach(link)

    def detach(self, server: Server, why: str, *, blamed: bool = False) -> None:
        """The server's link to the ranks breaks."""
        link = server.link
        if link is None:
            return
        self.log("detach", server.name, why, link.under_way)
        if blamed and link.under_way and not link.lost:
            self.blames[link.under_way] += 1
        link.lose(why, blamed=blamed)
        if link.group.link is link:
            link.group.detach()

        def tell() -> None:
            # Soon, but not in the same moment.
            server.process.call(self._detached, server, link)

        self.later(self.rng.choice([0.0, 0.0, 0.002, 0.2]), tell)

    def _detached(self, server: Server, link: Any) -> None:
        server.models.place.detach(link)
        if server.link is link:
            server.link = None
        self.attach()

    def ranks_die(self, group: RankGroup, *, blamed: bool) -> None:
        """A rank group ends, by itself or not."""
        if not group.alive:
            return
        self.log("ranks die", group.name, blamed)
        self.count("ranks die by themselves" if blamed else "ranks are killed")
        link, server = group.link, self.server
        group.die()
        if link is not None and server is not None and server.link is link:
            self.detach(server, "the ranks died", blamed=blamed)
        if self.group is group:
            self.group = None
            delay_s = self.rng.choice([0.0, 0.05, 1.0, 4.0])
            self.later(delay_s, lambda: self.group or self.start_ranks())

    def later(self, delay_s: float, function: Callable[[], object]) -> None:
        """Do something after a while."""
        self.loop.call_later(delay_s, function, context=self.context)

    # --- the run ------------------------------------------------------------------------------

    def run(self) -> None:
        """Do it all."""
        try:
            self.loop.run_until_complete(self.loop.create_task(self._main(), context=self.context))
        except Hang:
            self.fail("nothing is ready and no timer is set")
        finally:
            self.loop.end()

    def result(self) -> Result:
        """What came of it."""
        return Result(
            self.seed, self.failures, self._hash.hexdigest(), self.counts, self.checks, self.trace
        )

    async def _main(self) -> None:
        self.start_server()
        self.start_ranks()
        count = self.rng.randint(2, 4)
        total = self.rng.randint(25, 60)
        self.users = [ModelUser(self, f"c{index}", total // count) for index in range(count)]
        users = [self.spawn(self._use(user)) for user in self.users]
        await self.nemesis.run()
        self.log("calm")
        if not await audit.all_done(self, users):
            return
        await audit.settle(self)
        if not self.failures:
            await audit.audit(self)

    async def _use(self, user: ModelUser) -> None:
        await asyncio.sleep(self.rng.uniform(0, 2))
        try:
            await user.run()
        except Exception as error:
            self.fail(f"{user.name}: {error!r}", error)

    def hit(self, name: str) -> None:
        """A failpoint is reached."""
        process = PROCESS.get()
        if process is not None and process.alive and self.nemesis.strikes(name):
            self.count(f"killed at {name}")
            server = self.server
            assert server is not None
            if server.process is process:
                self.kill_server(server, f"killed at {name}")
                raise Killed


def simulate(seed: int, *, tracing: bool = False) -> Result:
    """One run; what it gives depends on the seed and nothing else."""
    log = logging.getLogger("tinsmithd")
    hit, hook, level, was_on = failpoints.hit, sys.unraisablehook, log.level, gc.isenabled()
    # What is destroyed at the end may not take part in the run, nor complain.
    gc.disable()
    gc.freeze()
    log.setLevel(logging.INFO if tracing else logging.CRITICAL)
    try:
        world = World(seed, tracing=tracing)
        failpoints.hit = world.hit
        world.run()
        result = world.result()
        sys.unraisablehook = lambda unraisable: None
        failpoints.hit = hit
        with warnings.catch_warnings():
            # Killed processes leave coroutines that never began.
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            del world
            gc.collect()
        return result
    finally:
        failpoints.hit, sys.unraisablehook = hit, hook
        log.setLevel(level)
        gc.unfreeze()
        if was_on:
            gc.enable()
