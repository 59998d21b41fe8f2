"""What goes wrong in a run: which faults, when, and for how long."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sim.world import World

LEASE_S = 3.0
FAILPOINTS = ("wal_append", "enqueue", "pre_result", "post_result_pre_ack", "restore_mid")


class Nemesis:
    """Does the faults of one run. Each run has some kinds of them and not others."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.rng = world.stream("nemesis")
        faults: dict[str, Callable[[], Awaitable[None]]] = {
            "kill server": self._kill_server,
            "kill at failpoint": self._kill_at_failpoint,
            "power": self._power,
            "zombie server": self._zombie_server,
            "graceful restart": self._graceful,
            "kill ranks": self._kill_ranks,
            "ranks die": self._ranks_die,
            "zombie ranks": self._zombie_ranks,
            "link breaks": self._link_breaks,
            "disk full": self._disk_full,
            "disk broken": self._disk_broken,
            "slow disk": self._slow_disk,
            "rot": self._rot,
            "ruin": self._ruin,
            "checkpoints down": self._checkpoints_down,
            "checkpoints hang": self._checkpoints_hang,
            "checkpoint answers lost": self._checkpoint_answers_lost,
            "mismatch": self._mismatch,
            "wrong result": self._wrong_result,
        }
        weights = {"ruin": 0.1, "mismatch": 0.1, "wrong result": 0.1}
        if world.tight:  # a step that is refused makes no room
            weights.update({"ranks die": 0.0, "mismatch": 0.0})
        self._faults = [
            (name, fault)
            for name, fault in faults.items()
            if self.rng.random() < weights.get(name, 0.3)
        ]
        self._count = self.rng.randint(1, 8)
        self._armed: tuple[str, int] | None = None
        self._power_at_write = 0
        self.mismatches = any(name == "mismatch" for name, _ in self._faults)
        if self.rng.random() < 0.7:
            world.network.loss = self.rng.choice([0.05, 0.2])
            world.network.doubling = self.rng.choice([0.0, 0.1, 0.3])
            world.network.slow = self.rng.choice([0.0, 0.05, 0.2])

    async def run(self) -> None:
        """Do all faults, and let everything be well again."""
        pending = []
        for _ in range(self._count if self._faults else 0):
            await asyncio.sleep(self.rng.expovariate(1.0) * (0.2 + self.world.pace_s))
            name, fault = self.rng.choice(self._faults)
            self.world.count(name)
            self.world.log("fault", name)
            pending.append(self.world.spawn(fault()))
        await asyncio.gather(*pending)
        await asyncio.sleep(self.rng.uniform(0.0, 5.0))
        self._armed, self._power_at_write, self.world.wrong_in = None, 0, 0
        network = self.world.network
        network.loss = network.doubling = network.slow = 0.0

    def strikes(self, name: str) -> bool:
        """Whether the process that reached this failpoint dies there."""
        if self._armed is None or self._armed[0] != name:
            return False
        name, left = self._armed
        self._armed = (name, left - 1) if left > 1 else None
        return left <= 1

    # --- the Training server ------------------------------------------------------------------

    async def _kill_server(self) -> None:
        server = self.world.server
        if server is not None:
            process = server.process
            process.doom = lambda: self.world.kill_server(server)
            process.doom_at = process.steps + self.rng.randint(1, 300)

    async def _kill_at_failpoint(self) -> None:
        self._armed = (self.rng.choice(FAILPOINTS), self.rng.randint(1, 5))

    async def _power(self) -> None:
        if self.rng.random() < 0.5:
            self._power_at_write = self.rng.randint(1, 20)
            return
        server = self.world.server
        if server is not None:
            process = server.process
            process.doom = self._power_fails
            process.doom_at = process.steps + self.rng.randint(1, 300)

    def wrote(self) -> None:
        """A transaction was written and is not synced."""
        if self._power_at_write:
            self._power_at_write -= 1
            if not self._power_at_write:
                self.world.later(self.rng.uniform(0.0, 0.006), self._power_fails)

    def _power_fails(self) -> None:
        if self.world.server is not None:
            self.world.kill_server(self.world.server, "power lost")
        self.world.disk.lose_power()

    async def _zombie_server(self) -> None:
        if self.rng.random() < 0.3 and self.world.server is not None:
            self.world.kill_server(self.world.server)  # the one after it is stopped at its start
        while self.world.server is None:
            await asyncio.sleep(0.01)
        server = self.world.server
        process = server.process
        stopped = asyncio.Event()

        def stop() -> None:
            process.stop()
            stopped.set()

        process.doom = stop
        process.doom_at = process.steps + self.rng.randint(1, self.rng.choice([6, 100]))
        try:
            async with asyncio.timeout(5.0):
                await stopped.wait()
        except TimeoutError:
            process.doom_at = 0
            return
        self.world.log("stopped", server.name)
        await asyncio.sleep(self.rng.uniform(0.05, 2.0))
        if self.world.server is server:
            self.world.replace_server()
        await asyncio.sleep(self.rng.choice([0.0, 0.01, 0.5, 5.0]))
        self.world.log("resumed", server.name)
        process.resume()
        await asyncio.sleep(self.rng.uniform(0.5, 5.0))
        self.world.kill_server(server, "killed")

    async def _graceful(self) -> None:
        server = self.world.server
        if server is not None and server.up:
            server.stop_gracefully()

    # --- ranks --------------------------------------------------------------------------------

    async def _kill_ranks(self) -> None:
        if self.world.group is not None:
            self.world.ranks_die(self.world.group, blamed=False)

    async def _ranks_die(self) -> None:
        group = self.world.group
        if group is not None:
            blamed = self.rng.random() < 0.7
            group.doom = lambda: self.world.ranks_die(group, blamed=blamed)
            group.doom_in = self.rng.randint(1, 40)

    async def _zombie_ranks(self) -> None:
        group = self.world.group
        if group is None or group.stopped:
            return
        group.stop()
        await asyncio.sleep(LEASE_S)
        if self.world.group is group:
            server, link = self.world.server, group.link
            if server is not None and link is not None and server.link is link:
                self.world.detach(server, "the ranks said nothing")
                group.haunt(link)  # nobody told them: they go on for one who does not listen
            self.world.start_ranks()
        await asyncio.sleep(self.rng.uniform(0.0, 2.0))
        group.resume()
        await asyncio.sleep(2.0)
        self.world.ranks_die(group, blamed=False)

    async def _link_breaks(self) -> None:
        server = self.world.server
        if server is not None:
            self.world.detach(server, "the connection broke")

    async def _mismatch(self) -> None:
        right = self.world.identity
        self.world.identity = {**right, "engine": "e2"}
        if self.world.group is not None:
            self.world.ranks_die(self.world.group, blamed=False)
        await asyncio.sleep(self.rng.uniform(1.0, 6.0))
        self.world.identity = right
        if self.world.group is not None:
            self.world.ranks_die(self.world.group, blamed=False)

    async def _wrong_result(self) -> None:
        self.world.wrong_in = self.rng.randint(1, 12)
        if self.world.group is not None:
            self.world.ranks_die(self.world.group, blamed=False)

    # --- disks --------------------------------------------------------------------------------

    async def _fail_disk(self, how: str) -> None:
        self.world.disk.failure = how
        await asyncio.sleep(self.rng.choice([0.05, 1.0, 4.0]))
        self.world.disk.failure = ""

    async def _disk_full(self) -> None:
        await self._fail_disk("full")

    async def _disk_broken(self) -> None:
        await self._fail_disk("broken")

    async def _slow_disk(self) -> None:
        self.world.disk.slow_s = self.rng.choice([0.05, 0.5, 3.0])
        await asyncio.sleep(self.rng.uniform(1.0, 6.0))
        self.world.disk.slow_s = 0.0

    async def _rot(self) -> None:
        await self._damage(ruin=False)

    async def _ruin(self) -> None:
        await self._damage(ruin=True)

    async def _damage(self, *, ruin: bool) -> None:
        disk, chosen = self.world.disk, []
        for _ in range(50):
            chosen = self._choose(ruin=ruin)
            if chosen:
                break
            await asyncio.sleep(0.1)
        for folder in chosen:
            disk.rotten.add(folder)
            if folder in disk.folders:
                self.world.log("rot", folder, disk.folders[folder].rot(self.rng))
                self.world.count("snapshots damaged")
        # It is found out only by whoever reads it.
        if self.rng.random() < 0.7 and self.world.group is not None:
            self.world.ranks_die(self.world.group, blamed=False)
        if ruin:
            await asyncio.sleep(self.rng.uniform(0.0, 1.0))
            await self._kill_server()

    def _choose(self, *, ruin: bool) -> list[str]:
        """Snapshots that may be damaged: a model has to stay recoverable, unless it is to go."""
        disk, models = self.world.disk, self.world.disk.tables.models
        model_id = self.rng.choice(sorted(models)) if models else ""
        if not model_id or not models[model_id].snapshots:
            return []
        table = models[model_id]
        folders = [found.folder for _, found in sorted(table.snapshots.items())]
        if ruin:
            self.world.ruined.add(model_id)
            return folders
        # Where there are two kinds of ranks, the calls after an older snapshot may be of both, and
        # nobody can make them all again.
        if self.mismatches or any(folder in disk.rotten for folder in folders):
            return []
        if len(folders) == 1 and (table.trimmed_to or table.from_checkpoint):
            return []
        return [self.rng.choice(folders)]

    # --- checkpoints --------------------------------------------------------------------------

    async def _checkpoints_down(self) -> None:
        self.world.checkpoints.down = True
        await asyncio.sleep(self.rng.uniform(0.2, 4.0))
        self.world.checkpoints.down = False

    async def _checkpoints_hang(self) -> None:
        self.world.checkpoints.going.clear()
        await asyncio.sleep(self.rng.uniform(0.2, 15.0))
        self.world.checkpoints.going.set()

    async def _checkpoint_answers_lost(self) -> None:
        self.world.checkpoints.losing = True
        await asyncio.sleep(self.rng.uniform(0.2, 3.0))
        self.world.checkpoints.losing = False
