"""Rows 11 and 12: what the wire and the queue cost, through a real cluster on this machine."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from bench.harness import Agreement, Result, Side, estimate, measure, middle, walls
from bench.sides import Settings
from clusters import RunningCluster
from faults.harness import environment
from tinsmith import tensors
from tinsmith import v1 as pb
from tinsmith.v1 import Cluster, connect
from tinsmithd.domain import AdamParams, CrossEntropy, Datum, LoraConfig
from tinsmithd.trainer.engines.factory import make_engine
from tiny_models import write_tiny_model

NO_OP_TARGETS_MS = {50: 1.0, 99: 3.0}
OVERHEAD_TARGET_MS = 5.0
SHARE_TARGET_PERCENT = 1.0
STEP_S = 1.0
WARM_UPS = 3
NO_OP_CALLS_PER_PAIR = 100
WARM_UP_CALLS = 50
TARGETS_PER_POSITION = 64
"""Many targets per position make many bytes of few tokens, so that computing does not drown the
wire: each position has 8 bytes of token and 12 per target."""
DATUM_TOKENS = 256
DATA = 5
LORA = LoraConfig(rank=4, seed=1, train_unembed=False)
MODEL_ID = "bench"
VOCAB_SIZE = 256
STAY = AdamParams(learning_rate=0.0)
ROUNDS_PER_PAIR = 3


def rpc(settings: Settings) -> list[Result]:
    """A call that does nothing, and one of a megabyte less what its engine took.

    The engine's time is what the rank says of that very call; an engine of the same kind with the
    same model and data in this process, in turn with the calls, must give the same numbers.
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
                clock = _cpu_clock([running.pid(name) for name in running.addresses])
                results += _megabyte(cluster, model_id, folder, clock, settings, durability)
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
    cluster: Cluster,
    model_id: str,
    folder: Path,
    cpu_clock: Callable[[], float],
    settings: Settings,
    durability: str,
) -> list[Result]:
    """Client time less engine time of one ForwardBackward, and its share of a step of a second."""
    data = _wide_data()
    engine = make_engine(
        "deepspeed",
        str(folder),
        dtype="float32",
        zero_stage=settings.zero_stage,
        on_progress=lambda _: None,
    )
    engine.create_model(MODEL_ID, LORA)
    answers: dict[str, list[np.ndarray]] = {}
    engine_s: list[float] = []

    def call() -> None:
        request = _request(model_id, data)
        stream = cluster.training.ForwardBackward(iter([request]))
        outputs = [o for r in stream for o in r.outputs]
        engine_s.append(float(dict(stream.trailing_metadata())["tinsmith-engine-seconds"]))
        answers["client"] = [tensors.decode(o.loss_fn_outputs["logprobs"]) for o in outputs]

    def compute() -> None:
        found = answers["engine"] = []
        engine.forward(
            MODEL_ID,
            data,
            CrossEntropy(),
            backward=True,
            on_result=lambda _, outputs: found.append(outputs["logprobs"]),
        )

    step = pb.OptimStepRequest(model_id=model_id, adam_params=pb.AdamParams(learning_rate=0))
    timings = measure(
        [
            Side("client", call, lambda: cluster.training.OptimStep(step), cpu_clock),
            Side("engine", compute, lambda: engine.optim_step(MODEL_ID, STAY)),
        ],
        settings.pairs * ROUNDS_PER_PAIR,
        warm_ups=WARM_UPS,
    )
    own_s = np.array(engine_s[WARM_UPS:])
    overhead_ms = (walls(timings["client"]) - own_s) * 1e3
    sides = {name: middle(found) for name, found in timings.items()}
    apart = [np.abs(a - b).max() for a, b in zip(*answers.values(), strict=True)]
    agreement = Agreement(float(np.max(apart)), 0.0)
    size = _request(model_id, data).ByteSize()
    what = f"ForwardBackward of {size / 1e6:.2f} MB, {durability}: client - engine time"
    share = f"the same in percent of a step of {STEP_S:g} s"
    percent = overhead_ms / 1e3 / STEP_S * 100
    own_ms = float(np.median(own_s)) * 1e3
    notes = f"p50; the engine said {own_ms:.1f} ms of its own calls; CPU is of all processes"
    common = {"sides": sides, "agreement": agreement, "notes": notes}
    return [
        Result("11", what, estimate(overhead_ms), "ms", target=OVERHEAD_TARGET_MS, **common),
        Result("12", share, estimate(percent), "%", target=SHARE_TARGET_PERCENT, **common),
    ]


def _cpu_clock(servers: Sequence[int]) -> Callable[[], float]:
    """CPU seconds so far of this process, some servers and the processes that those started."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
    pids = set(servers)
    while more := {pid for pid, parent in parents.items() if parent in pids} - pids:
        pids |= more

    def clock() -> float:
        # Unlike the times in `stat`, these are finer than a clock tick.
        tasks = (task for pid in pids for task in Path(f"/proc/{pid}/task").iterdir())
        others_ns = sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)
        return time.process_time() + others_ns / 1e9

    return clock


def _wide_data() -> list[Datum]:
    rng = np.random.default_rng(0)
    shape = (DATUM_TOKENS, TARGETS_PER_POSITION)
    return [
        Datum(
            rng.integers(0, VOCAB_SIZE, DATUM_TOKENS),
            {
                "target_tokens": rng.integers(0, VOCAB_SIZE, shape),
                "weights": rng.normal(size=shape).astype(np.float32),
            },
        )
        for _ in range(DATA)
    ]


def _request(model_id: str, data: Sequence[Datum]) -> pb.ForwardBackwardRequest:
    return pb.ForwardBackwardRequest(
        model_id=model_id,
        loss_fn=pb.LossFn(cross_entropy=pb.CrossEntropyLoss()),
        data=[
            pb.Datum(
                model_input=pb.ModelInput(
                    chunks=[pb.ModelInputChunk(tokens=tensors.encode(datum.tokens))]
                ),
                loss_fn_inputs={k: tensors.encode(v) for k, v in datum.loss_fn_inputs.items()},
            )
            for datum in data
        ],
    )
