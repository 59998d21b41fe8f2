"""Many small calls, and many callers, on one Training server; its ranks compute nothing."""

import contextlib
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from bench.remote import Remote
from clusters import RunningCluster
from limits.checkpoint import checkpoint_limits
from limits.gateway import gateway_limits
from limits.held import Limits
from limits.sampler import sampler_limits
from limits.training import training_limits
from scale.callers import Times
from scale.report import Figure, percentiles
from scale.servers import Keys, Server, idle_ranks
from scale.sizes import Sizes
from tiny_models import write_tiny_model

MODELS = 50
WARM_UP_S = 3.0
HEAVY_MODELS = 50
HEAVY_CALLS_EACH = 20
HEAVY_DATA = 16
LIGHT = ("light-1", "light-2", "light-3")
FAIR_S = 20.0
KIB = 1024


def calls(sizes: Sizes) -> Iterator[Figure]:
    """forward_backward and optim_step of 50 models by turns, at several rates, on the disk."""
    for rate in (sizes.rate // 4, sizes.rate // 2, sizes.rate, 2 * sizes.rate):
        seconds = sizes.seconds if rate == sizes.rate else sizes.seconds / 4
        yield from _calls(rate, seconds)


def _calls(rate: int, seconds: float) -> Iterator[Figure]:
    at = f"{rate} calls/s"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        keys = Keys(folder, "one")
        with (
            Server("training", folder, keys) as server,
            idle_ranks(server),
            Remote("scale.callers:Callers", server.address, keys.tenants["one"]) as callers,
        ):
            ids = callers.call("create", MODELS)
            callers.call("at_rate", ids, rate, WARM_UP_S)
            cpu_s, before = server.cpu_s, _journal_bytes(server)
            times: Times = callers.call("at_rate", ids, rate, seconds)
            count = len(times.took_ms)
            yield Figure("calls", at, "answered", count / times.wall_s, "calls/s")
            yield Figure("calls", at, "failed", len(times.failed), "calls", 0, _first(times))
            yield from percentiles("calls", at, "call", times.took_ms)
            late_ms = float(np.percentile(times.late_ms, 99))
            yield Figure("calls", at, "of that, late sent p99", late_ms, "ms")
            count = max(1, count)
            used_ms = (server.cpu_s - cpu_s) / count * 1e3
            yield Figure("calls", at, "processor of the server", used_ms, "ms/call")
            yield Figure("calls", at, "memory", server.memory_mib, "MiB")
            per_call = (_journal_bytes(server) - before) / count / KIB
            yield Figure("calls", at, "journal and its log grew", per_call, "KiB/call")
            yield Figure("calls", at, "written to the disk", _written(server, count), "KiB/call")


def _journal_bytes(server: Server) -> int:
    return sum(file.stat().st_size for file in (server.folder / "data").glob("journal.sqlite*"))


def _written(server: Server, count: int) -> float:
    return float(server.watched.io_counters().write_bytes / count / KIB)


def _first(times: Times) -> str:
    return times.failed[0][:80] if times.failed else ""


# --- tenants ------------------------------------------------------------------------------------


def fairness(sizes: Sizes) -> Iterator[Figure]:
    """Three light tenants, alone and beside one that has 1,000 calls queued for 50 models.

    The rule: beside, the light ones' p99 is at most twice what it is alone, and one turn.
    """
    for data in (1, HEAVY_DATA):
        yield from _fairness(sizes, data)


def _fairness(sizes: Sizes, data: int) -> Iterator[Figure]:
    at = f"heavy calls of {data} data"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        keys = Keys(folder, "heavy", *LIGHT)
        settings = {"concurrent_calls_max": 4096}
        with (
            Server("training", folder, keys, **settings) as server,
            idle_ranks(server, sizes.turn_ms),
            Remote("scale.callers:Callers", server.address, keys.tenants["heavy"]) as heavy,
            Remote("scale.rows_calls:LightOnes", server.address, keys.tenants) as light,
        ):
            alone_ms: list[float] = light.call("run", FAIR_S / 2)
            ids = heavy.call("create", HEAVY_MODELS)
            found: list[Times] = []
            queue = (ids, HEAVY_CALLS_EACH, FAIR_S, data)
            busy = threading.Thread(target=lambda: found.append(heavy.call("keep_queued", *queue)))
            busy.start()
            beside_ms: list[float] = light.call("run", FAIR_S * 0.8)
            busy.join()
            alone_ms += light.call("run", FAIR_S / 2)
    p99_ms = float(np.percentile(alone_ms, 99))
    yield from percentiles("fairness", at, "light call alone", alone_ms)
    target_ms = 2 * p99_ms + sizes.turn_ms
    yield from percentiles("fairness", at, "light call beside", beside_ms, target_ms)
    count = len(found[0].took_ms)
    notes = f"{len(found[0].failed)} failed {_first(found[0])}"
    yield Figure("fairness", at, "heavy calls", count / found[0].wall_s, "calls/s", notes=notes)


class LightOnes:
    """Three tenants with a model each, who make one call after the other.

    Args:
        address: Of the Training server.
        keys: By tenant.
    """

    def __init__(self, address: str, keys: dict[str, str]) -> None:
        from scale.callers import Callers

        self._callers = [Callers(address, keys[tenant]) for tenant in LIGHT]
        self._ids = [each.create(1) for each in self._callers]

    def run(self, seconds: float) -> list[float]:
        """Make calls for so long; what each took, ms."""
        found: list[Times] = []

        def one(index: int) -> None:
            found.append(self._callers[index].keep_queued(self._ids[index], 1, seconds))

        threads = [threading.Thread(target=one, args=(index,)) for index in range(len(LIGHT))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not any(times.failed for times in found), found
        return [took for times in found for took in times.took_ms]


# --- limits -------------------------------------------------------------------------------------

REFUSED_MS = 50.0
MIB = 1024 * 1024


@contextlib.contextmanager
def _sampler_limits(folder: Path) -> Iterator[Limits]:
    base_model = write_tiny_model(folder / "base" / "tiny-llama")
    with sampler_limits(base_model, folder) as limits:
        yield limits


@contextlib.contextmanager
def _gateway_limits(folder: Path) -> Iterator[Limits]:
    base_model = write_tiny_model(folder / "base" / "tiny-llama")
    with (
        RunningCluster(base_model, folder / "cluster") as cluster,
        gateway_limits(cluster.address, folder) as limits,
    ):
        yield limits


LIMITS: dict[str, Callable[[Path], contextlib.AbstractContextManager[Limits]]] = {
    "training": training_limits,
    "checkpoint": checkpoint_limits,
    "sampler": _sampler_limits,
    "gateway": _gateway_limits,
}


def limits(sizes: Sizes) -> Iterator[Figure]:
    """Each named limit of each server: at its value a call passes; how soon one above is refused,
    and what the server's memory grew by meanwhile, at most."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder = Path(scratch)
        for server, opened in LIMITS.items():
            of_server = stack.enter_context(opened(folder / server))
            for name in of_server.names:
                held = of_server.hold(name)
                at, refusal = f"{server} {name}", held.refusal
                notes = f"{refusal.status} {refusal.reason}, of {held.refused_bytes / MIB:.3f} MiB"
                yield Figure("limits", at, "refused", held.refused_ms, "ms", REFUSED_MS, notes)
                yield Figure("limits", at, "memory grew", held.grew_bytes / MIB, "MiB")
