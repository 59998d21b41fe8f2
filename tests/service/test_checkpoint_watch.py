"""Who watches is told of checkpoints as they are committed; nobody may rest on it."""

import asyncio
from pathlib import Path
from typing import Any

import grpc

from checkpoint_server import Served
from checkpoints import PATH
from tinsmith import v1 as pb
from tinsmithd.checkpoint.watchers import UNTOLD_MAX

SAMPLER = "tinsmith://run/sampler_weights/"


async def watch(served: Served, **wanted: Any) -> Any:
    """A watch that has begun."""
    call = served.stub.WatchCheckpoints(pb.WatchCheckpointsRequest(**wanted))
    assert await call.read() == pb.WatchCheckpointsResponse()
    return call


async def test_a_watcher_is_told_of_what_it_wants_as_it_is_committed(served: Served) -> None:
    """With all that a reader needs to know, and of nothing that was there before."""
    await served.write(SAMPLER + "before")
    kind = pb.CheckpointKind.CHECKPOINT_KIND_SAMPLER
    mine = await watch(served, kind=kind, base_model="tiny")
    every = await watch(served)
    await served.write(PATH, seed=1)
    await served.write(SAMPLER + "other", seed=2, base_model="other")
    written = await served.write(SAMPLER + "ephemeral-1", seed=3, ephemeral=True)
    assert (await mine.read()).checkpoint == written
    assert written.files
    told = [(await every.read()).checkpoint.checkpoint_path for _ in range(3)]
    assert told == [PATH, SAMPLER + "other", SAMPLER + "ephemeral-1"]


async def test_a_watcher_that_does_not_read_costs_the_writers_nothing(served: Served) -> None:
    """It misses the oldest, and hears of the newest."""
    call = await watch(served)
    count = 3 * UNTOLD_MAX
    for seed in range(count):
        await served.write(f"{SAMPLER}n-{seed}", seed=seed % 3)
    told = []
    while not told or told[-1] != f"{SAMPLER}n-{count - 1}":
        told.append((await call.read()).checkpoint.checkpoint_path)
    assert told == sorted(told, key=lambda path: int(path.rpartition("-")[2]))


async def test_a_server_that_stops_lets_its_watchers_go(tmp_path: Path) -> None:
    """Long before its grace is over."""
    served = Served(tmp_path, stop_grace_s=60)
    await served.start()
    call = await watch(served)
    async with asyncio.timeout(30):
        await served.server.stop()
        assert await call.read() is grpc.aio.EOF
    await served.channel.close()
