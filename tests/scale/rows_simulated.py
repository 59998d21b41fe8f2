"""Many small calls in the simulator, with costs that are measured here first."""

import asyncio
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench.remote import Remote
from scale import busy_world
from scale.busy_world import Costs
from scale.callers import Times
from scale.engine import INFO, LORA, Idle
from scale.report import Figure
from scale.servers import Keys, Server, idle_ranks
from scale.sizes import Sizes
from tinsmithd.training.call import CallKind, ComputeWork, StoredAnswer
from tinsmithd.training.journal import AddAnswer, AddCall, AddModel, SqliteStore, Write
from tinsmithd.training.models import Model
from training_calls import CROSS_ENTROPY, datum

COMMITS = 100
MODELS = 50
LARGE = 40
"""Writes of a large commit."""
TARGET_MS = 1000.0


def simulated(sizes: Sizes) -> Iterator[Figure]:
    """Rates up to where the line bends, with the costs of this machine."""
    costs = measured()
    for name, value in vars(costs).items():
        yield Figure("simulated", "measured here", name, value * 1e3, "ms")
    for rate in (sizes.rate // 2, sizes.rate, 2 * sizes.rate, 4 * sizes.rate):
        seconds = min(sizes.seconds, 20.0)
        took_s, over_s = busy_world.run(costs, MODELS, rate, seconds)
        at = f"{rate} calls/s"
        yield Figure("simulated", at, "answered", len(took_s) / over_s, "calls/s")
        for percent in (50, 99):
            value = float(np.percentile(took_s, percent)) * 1e3
            yield Figure("simulated", at, f"call p{percent}", value, "ms")


def measured() -> Costs:
    """What things cost on this machine."""
    with tempfile.TemporaryDirectory() as scratch:
        small_s, large_s = asyncio.run(_commits(Path(scratch) / "journal"))
        write_s = max(0.0, (large_s - small_s) / (LARGE - 2))
        folder = Path(scratch) / "server"
        keys = Keys(folder, "one")
        # With nothing on the disk a call is the server's processor and the ranks.
        with (
            Server("training", folder, keys, durability="none") as server,
            idle_ranks(server),
            Remote("scale.callers:Callers", server.address, keys.tenants["one"]) as callers,
        ):
            ids = callers.call("create", 1)
            callers.call("keep_queued", ids, 1, 1.0)
            cpu_s = server.cpu_s
            times: Times = callers.call("keep_queued", ids, 1, 3.0)
            call_s = (server.cpu_s - cpu_s) / len(times.took_ms)
        command_s = max(0.0, float(np.median(times.took_ms)) / 1e3 - call_s)
    return Costs(call_s, max(0.0, small_s - 2 * write_s), write_s, command_s)


async def _commits(folder: Path) -> tuple[float, float]:
    """What a commit of two writes takes, and one of many, seconds."""
    store = SqliteStore(folder, sync=True)
    await store.claim()
    model = Model("m", INFO, LORA, {}, 1, Idle.identity)
    await store.commit([AddModel("m", 1, model.about())])
    position, medians = 0, []
    for count in (2, LARGE):
        took_s = []
        for _ in range(COMMITS):
            writes: list[Write] = []
            for _ in range(count // 2):
                position += 1
                writes += _call_and_answer(position)
            begun_s = time.perf_counter()
            await store.commit(writes)
            took_s.append(time.perf_counter() - begun_s)
            await store.tidy()
        medians.append(float(np.median(took_s)))
    await store.close()
    return medians[0], medians[1]


def _call_and_answer(position: int) -> list[Write]:
    data = [datum().SerializeToString()]
    work = ComputeWork(CROSS_ENTROPY.SerializeToString(), data, [5], True)
    value = {"metrics": {"loss:sum": 1.5}}
    answer = StoredAnswer([bytes(60)], value, kind=CallKind.FORWARD_BACKWARD)
    return [
        AddCall("m", position, position, bytes(32), work),
        AddAnswer("m", position, answer, b"composition"),
    ]
