"""Rows 16 and 28: what it costs to lose nothing, and how long it takes to be back."""

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np

from bench.harness import Agreement, Result, Side, Timing, estimate, measure, middle, ratio
from bench.sides import Settings
from clusters import RunningCluster
from faults.processes import Training
from programs import environment
from tinsmith import tensors
from tinsmith import v1 as pb
from tinsmith.cluster import Cluster, connect
from tiny_models import write_tiny_model

DURABLE_TARGET = 1.03
BACK_TARGET_S = 2.0
DATUM_TOKENS = 256
DATA = 24
SNAPSHOT_STEPS = 20
REPLAYED = 10


def durable_step(settings: Settings) -> list[Result]:
    """A step of a cluster that loses nothing beside one that keeps nothing, snapshots included.

    Its forward_backward and optim_step are sent together, and both answers are awaited.
    """
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = write_tiny_model(scratch / "tiny-llama", context_length=DATUM_TOKENS)
        answers: dict[str, list[np.ndarray]] = {}
        steps: dict[str, Callable[[], None]] = {}
        for durability in ("fsync", "none"):
            with environment(TINSMITH_TRAINING_DURABILITY=durability):
                data = scratch / durability
                running = stack.enter_context(RunningCluster(folder, data))
            cluster = stack.enter_context(connect(running.address))
            steps[durability] = _step(cluster, answers.setdefault(durability, []))
        sides = [Side(name, step) for name, step in steps.items()]
        # Long enough for snapshots to be among what is measured.
        timings = measure(sides, max(settings.pairs, 3) * SNAPSHOT_STEPS // 3, warm_ups=3)
    apart = [np.abs(a - b).max() for a, b in zip(*answers.values(), strict=True)]
    middles = {name: middle(found) for name, found in timings.items()}
    step_ms = middles["none"].wall_s * 1e3
    return [
        Result(
            "16",
            f"step of {step_ms:.0f} ms, fsync / none",
            ratio(timings["fsync"], timings["none"]),
            target=DURABLE_TARGET,
            sides=middles,
            agreement=Agreement(float(np.max(apart)), 0.0),
            notes=f"a snapshot every {SNAPSHOT_STEPS} steps",
        )
    ]


def _step(cluster: Cluster, seen: list[np.ndarray]) -> Callable[[], None]:
    lora = pb.LoraConfig(rank=8, seed=1)
    created = cluster.training.CreateModel(pb.CreateModelRequest(lora_config=lora))
    model_id = created.model.model_id
    numbers = iter(range(1, 1_000_000))
    request = _request(model_id)
    adam = pb.AdamParams(learning_rate=1e-3)

    def step() -> None:
        request.seq_id = next(numbers)
        stepped = pb.OptimStepRequest(model_id=model_id, seq_id=next(numbers), adam_params=adam)
        results = cluster.training.ForwardBackward(iter([request]))
        future = cluster.training.OptimStep.future(stepped)  # type: ignore[attr-defined]
        outputs = [output for result in results for output in result.outputs]
        future.result()
        seen[:] = [tensors.decode(output.loss_fn_outputs["logprobs"]) for output in outputs]

    return step


def _request(model_id: str, count: int = DATA) -> pb.ForwardBackwardRequest:
    rng = np.random.default_rng(0)
    request = pb.ForwardBackwardRequest(model_id=model_id)
    request.loss_fn.cross_entropy.SetInParent()
    for _ in range(count):
        chunk = pb.ModelInputChunk(tokens=tensors.encode(rng.integers(0, 256, DATUM_TOKENS)))
        inputs = {
            "target_tokens": tensors.encode(rng.integers(0, 256, DATUM_TOKENS)),
            "weights": tensors.encode(np.ones(DATUM_TOKENS, np.float32)),
        }
        request.data.add(model_input=pb.ModelInput(chunks=[chunk]), loss_fn_inputs=inputs)
    return request


def back_again(settings: Settings) -> list[Result]:
    """From kill -9 of the ranks until a call is answered, less what a rank needs to start.

    The start is measured in turn, of a group that attaches beside the one at work: process,
    imports, base model. What is left is noticing, bringing the model back with some small calls,
    and the call itself.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_tiny_model(Path(scratch) / "tiny-llama")
        training = Training(folder, Path(scratch), snapshot_steps=1000)
        with training, grpc.insecure_channel(training.address) as channel:
            timings = _times(training, pb.TrainingServiceStub(channel), settings.pairs)
    left_s = np.array(
        [
            back.wall_s - start.wall_s
            for back, start in zip(timings["killed"], timings["start"], strict=True)
        ]
    )
    return [
        Result(
            "28",
            "kill -9 to an answer, less start of a rank",
            estimate(left_s),
            unit="s",
            target=BACK_TARGET_S,
            sides={name: middle(found) for name, found in timings.items()},
            notes=f"tiny model; {2 * REPLAYED} small calls and more are replayed",
        )
    ]


def _times(training: Training, stub: pb.TrainingServiceStub, pairs: int) -> dict[str, list[Timing]]:
    training.start_rank()
    model_id = _created(stub)
    for _ in range(REPLAYED):
        list(stub.ForwardBackward(iter([_request(model_id, 1)])))
        stub.OptimStep(pb.OptimStepRequest(model_id=model_id))

    def start() -> None:
        said = training.server.log.read_text().count("a rank group stands by")
        rank = training.start_rank()
        training.server.until(
            lambda: training.server.log.read_text().count("a rank group stands by") > said
        )
        rank.kill()
        training.ranks.remove(rank)

    def killed() -> None:
        for rank in list(training.ranks):
            os.kill(rank.pid, signal.SIGKILL)
            rank.wait()
            training.ranks.remove(rank)
        training.start_rank()
        stub.OptimStep(pb.OptimStepRequest(model_id=model_id), timeout=120)

    return measure([Side("killed", killed), Side("start", start)], pairs, warm_ups=1)


def _created(stub: pb.TrainingServiceStub) -> str:
    for _ in _attempts():
        with contextlib.suppress(grpc.RpcError):
            lora = pb.LoraConfig(rank=8, seed=1)
            return str(stub.CreateModel(pb.CreateModelRequest(lora_config=lora)).model.model_id)
    raise TimeoutError("no trainer attached")


def _attempts() -> Iterator[int]:
    for attempt in range(600):
        yield attempt
        time.sleep(0.1)
