"""Rows 11 and 12: what the wire and the queue cost, through a real cluster on this machine."""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from bench.bare_hops import overheads_s
from bench.harness import Agreement, Result, Side, Timing, estimate, measure, middle, walls
from bench.rpc_client import DATUM_TOKENS, requests_of, wide_data
from bench.sides import Settings
from clusters import RunningCluster
from engines import make_engine
from programs import environment
from tinsmith import v1 as pb
from tinsmith.cluster import Cluster, connect
from tinsmithd.domain import CrossEntropy, LoraConfig
from tinsmithd.trainer.engines.interface import Batch
from tiny_models import write_tiny_model

NO_OP_TARGETS_MS = {50: 1.0, 99: 3.0}
OVERHEAD_TARGET_MS = 5.0
SHARE_TARGET_PERCENT = 1.0
STEP_S = 1.0
WARM_UPS = 10
NO_OP_CALLS_PER_PAIR = 100
WARM_UP_CALLS = 50
LORA = LoraConfig(rank=4, seed=1, train_unembed=False)
CALLS_PER_PAIR = 5


def rpc(settings: Settings) -> list[Result]:
    """A call that does nothing, and one of a megabyte less what its engine took.

    The engine's time is what the rank says of that very call; an engine of the same kind in this
    process must give the same numbers. What of the rest is gRPC's own is measured beside it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the cluster's rank
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_tiny_model(Path(scratch) / "tiny-llama", context_length=DATUM_TOKENS)
        for durability in ("none", "fsync"):
            with (
                environment(TINSMITH_TRAINING_DURABILITY=durability),
                RunningCluster(folder, Path(scratch) / durability) as running,
                connect(running.address) as cluster,
            ):
                lora = pb.LoraConfig(
                    rank=LORA.rank, seed=LORA.seed, train_unembed=LORA.train_unembed
                )
                created = cluster.training.CreateModel(pb.CreateModelRequest(lora_config=lora))
                model_id = created.model.model_id
                if durability == "none":
                    results += _no_op(cluster, model_id, settings)
                rows, engine_s = _megabyte(running, model_id, folder, settings, durability)
                results += rows
        results.append(_bare_hops(engine_s, settings))
    torch.set_num_threads(threads)
    return results


def _no_op(cluster: Cluster, model_id: str, settings: Settings) -> list[Result]:
    request = pb.GetModelRequest(model_id=model_id)
    side = Side("GetModel", lambda: cluster.training.GetModel(request))
    count = settings.pairs * NO_OP_CALLS_PER_PAIR
    timings = measure([side], count, warm_ups=WARM_UP_CALLS, collect=False)[side.name]
    return [
        Result(
            "11",
            f"GetModel p{percent}",
            estimate(walls(timings) * 1e3, lambda s, p=percent: float(np.percentile(s, p))),
            unit="ms",
            target=target,
            sides={"client": middle(timings)},
            notes=f"{count} calls, one after the other",
        )
        for percent, target in NO_OP_TARGETS_MS.items()
    ]


def _megabyte(
    running: RunningCluster, model_id: str, folder: Path, settings: Settings, durability: str
) -> tuple[list[Result], float]:
    """Client time less engine time of one ForwardBackward, and its share of a step of a second.

    Also the engine's seconds.
    """
    calls = settings.pairs * CALLS_PER_PAIR
    pids = _with_children([running.pid(name) for name in running.addresses])
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "client.npz"
        command = [
            *(sys.executable, "-m", "bench.rpc_client", running.address, model_id),
            *(str(WARM_UPS), str(calls), ",".join(map(str, pids)), str(file)),
        ]
        subprocess.run(command, check=True)
        with np.load(file) as loaded:
            found = dict(loaded)
    overhead_ms = (found["wall_s"] - found["engine_s"]) * 1e3
    sides = {
        "client": Timing(float(np.median(found["wall_s"])), float(np.median(found["cpu_s"]))),
    }
    expected = _engine_logprobs(folder, settings)
    apart = [np.abs(found[f"logprobs_{i}"] - array).max() for i, array in enumerate(expected)]
    size = sum(each.ByteSize() for each in requests_of(model_id, wide_data()))
    what = f"ForwardBackward of {size / 1e6:.2f} MB, {durability}: client - engine time"
    share = f"the same in percent of a step of {STEP_S:g} s"
    percent = overhead_ms / 1e3 / STEP_S * 100
    engine_s = float(np.median(found["engine_s"]))
    notes = (
        f"p50 of {calls} calls; the engine said {engine_s * 1e3:.1f} ms; CPU is of all processes"
    )
    agreement = Agreement(float(np.max(apart)), 0.0)
    common = {"sides": sides, "agreement": agreement, "notes": notes}
    rows = [
        Result("11", what, estimate(overhead_ms), "ms", target=OVERHEAD_TARGET_MS, **common),
        Result("12", share, estimate(percent), "%", target=SHARE_TARGET_PERCENT, **common),
    ]
    return rows, engine_s


def _bare_hops(work_s: float, settings: Settings) -> Result:
    """The same bytes through two hops of gRPC with nobody looking at them."""
    data = wide_data()
    calls = settings.pairs * CALLS_PER_PAIR
    seconds = overheads_s(
        [request.SerializeToString() for request in requests_of("bench", data)],
        sum(datum.loss_fn_inputs["weights"].nbytes for datum in data),
        work_s,
        WARM_UPS,
        calls,
    )
    return Result(
        "11",
        "of that, two hops of bare gRPC with the same bytes",
        estimate(seconds * 1e3),
        "ms",
        notes=f"p50 of {calls} calls; no servers of ours, nothing serialised, read or kept",
    )


def _engine_logprobs(folder: Path, settings: Settings) -> list[np.ndarray]:
    """What an engine of the same kind in this process gives with the same model and data."""
    engine = make_engine(
        "deepspeed",
        str(folder),
        dtype="float32",
        zero_stage=settings.zero_stage,
        on_progress=lambda _: None,
    )
    engine.create_model("bench", LORA)
    found: list[np.ndarray] = []
    engine.forward(
        Batch("bench", wide_data(), CrossEntropy(), backward=True),
        lambda _, outputs: found.append(outputs["logprobs"]),
    )
    return found


def _with_children(servers: Sequence[int]) -> set[int]:
    """Some processes and those that they started."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
    pids = set(servers)
    while more := {pid for pid, parent in parents.items() if parent in pids} - pids:
        pids |= more
    return pids
