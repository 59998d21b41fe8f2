"""Row 29: what others feel of a Checkpoint server that hangs, or takes 100 kB/s."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import numpy as np

import tinsmith
from bench.harness import Result, Timing, estimate
from bench.sides import Settings
from clusters import until_health
from faults.processes import Process, Training, hung
from faults.slow_way import SlowWay
from tinsmith import types
from tinsmithd.up import SERVICES
from tiny_models import write_tiny_model

TARGET = 1.1
VOCAB_SIZE = 49_152
RANK = 256
"""With that vocabulary the state that is saved and loaded has some 150 MB."""
SLOW_BYTES_PER_S = 100_000
CALLS = 20
"""Of each side in each round."""
TOKENS = 48
PROMPT = types.ModelInput.from_ints(list(range(16)))
PARAMS = types.SamplingParams(max_tokens=8, seed=1, stop=[])
WAIT_S_MAX = 300.0


class _World:
    """One server of each kind; those that reach the Checkpoint server do it through a slow way."""

    def __init__(self, folder: Path, stack: ExitStack, threads: int) -> None:
        base = write_tiny_model(folder / "tiny-wide", vocab_size=VOCAB_SIZE)
        settings = {"data_folder": folder / "checkpoints"}
        self.checkpoint = stack.enter_context(Process("checkpoint", folder, settings))
        self.way = stack.enter_context(SlowWay(self.checkpoint.port))
        target = {"checkpoint_target": self.way.address}
        one = {"base_model": base, "threads": threads, "running_max": 1, "adapters_max": 1}
        sampler = stack.enter_context(Process("sampler", folder, {**one, **target}))
        training = stack.enter_context(
            Training(
                base,
                folder,
                checkpoint_address=f":{self.checkpoint.port}",
                sampler_address=f":{sampler.port}",
                **target,
            )
        )
        training.start_rank(threads=threads)
        until_health(training.address, serving=True)
        until_health(f"127.0.0.1:{sampler.port}", serving=True, service=SERVICES["sampler"])
        self.service = stack.enter_context(tinsmith.ServiceClient(base_url=training.address))
        self.name = base.name

    def hung(self) -> AbstractContextManager[None]:
        """The Checkpoint server does nothing meanwhile."""
        return hung(self.checkpoint.pid)

    @contextlib.contextmanager
    def slow(self) -> Iterator[None]:
        """So much goes to it and from it meanwhile."""
        self.way.bytes_per_s = SLOW_BYTES_PER_S
        try:
            yield
        finally:
            self.way.bytes_per_s = 0

    @contextlib.contextmanager
    def beside(
        self, how: Callable[[], Any], start: Callable[[], tinsmith.APIFuture[Any]]
    ) -> Iterator["Future[Any]"]:
        """Something that needs the Checkpoint server is under way meanwhile, and ends well."""
        with how():
            before = self.way.sent
            future = start().future()
            end_s = time.monotonic() + WAIT_S_MAX
            while self.way.sent == before:
                if time.monotonic() > end_s:
                    raise TimeoutError("nothing came to the Checkpoint server")
                time.sleep(0.01)
            yield future
            if future.done():
                raise RuntimeError("it was over before what was measured beside it")
        future.result(WAIT_S_MAX)


def neighbour(settings: Settings) -> list[Result]:
    """Steps beside a save or a load, and samples beside a fetch, over the same undisturbed.

    The calls beside and alone are made in turn on one cluster. What trains takes snapshots, too.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        world = _World(folder, stack, settings.threads)
        step = _step(world)
        starts = _starts(world)
        base = world.service.create_sampling_client(base_model=world.name).result(WAIT_S_MAX)

        def sample() -> None:
            base.sample(PROMPT, 1, PARAMS).result(WAIT_S_MAX)

        results = []
        for what, start in starts.items():
            call, name = (sample, "sample") if what == "fetch" else (step, "step")
            for how in (world.hung, world.slow):
                title = f"{name} beside a {what}, Checkpoint server {how.__name__} / alone"
                results.append(
                    _row(title, call, lambda h=how, s=start: world.beside(h, s), settings)
                )
        return results


def _row(
    title: str, call: Callable[[], None], beside: Callable[[], Any], settings: Settings
) -> Result:
    call()
    rounds = []
    for number in range(max(settings.pairs, 3)):
        alone_s = _times(call) if number % 2 else []  # in turn, against drift
        with beside():
            beside_s = _times(call)
        rounds.append((beside_s, alone_s or _times(call)))
    samples = np.array(rounds)  # (rounds, 2, CALLS)
    sides = {
        side: Timing(float(np.median(samples[:, index])), 0.0)
        for index, side in enumerate(("beside", "alone"))
    }
    return Result(
        "29",
        title,
        estimate(samples, lambda s: float(np.median(s[:, 0]) / np.median(s[:, 1]))),
        target=TARGET,
        sides=sides,
        notes=f"p50 of {samples[:, 0].size} calls of each side",
    )


def _times(call: Callable[[], None]) -> list[float]:
    found = []
    for _ in range(CALLS):
        start_s = time.perf_counter()
        call()
        found.append(time.perf_counter() - start_s)
    return found


def _step(world: _World) -> Callable[[], None]:
    create = world.service.create_lora_training_client
    client = create(world.name, rank=8, seed=1, train_unembed=False).result(WAIT_S_MAX)
    rng = np.random.default_rng(0)
    row = rng.integers(0, 256, TOKENS + 1)
    inputs = {"target_tokens": row[1:], "weights": np.ones(TOKENS, np.float32)}
    data = [types.Datum(types.ModelInput.from_ints(row[:-1].tolist()), inputs)]

    def step() -> None:
        added = client.forward_backward(data, "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-4)).result(WAIT_S_MAX)
        added.result(WAIT_S_MAX)

    return step


def _starts(world: _World) -> Mapping[str, Callable[[], tinsmith.APIFuture[Any]]]:
    """What needs the Checkpoint server, each by a large model that is not measured."""
    client = world.service.create_lora_training_client(world.name, rank=RANK).result(WAIT_S_MAX)
    client.optim_step(types.AdamParams()).result(WAIT_S_MAX)
    path = client.save_state("there").result(WAIT_S_MAX).path
    samplers = []
    for number in range(2):
        saved = client.save_weights_for_sampler(f"sampler-{number}").result(WAIT_S_MAX)
        samplers.append(world.service.create_sampling_client(saved.path).result(WAIT_S_MAX))

    def fetch() -> tinsmith.APIFuture[Any]:
        samplers.reverse()  # one is in memory, and the other one is not
        return samplers[0].sample(PROMPT, 1, PARAMS)

    return {
        "save": lambda: client.save_state("again", overwrite=True),
        "load": lambda: client.load_state_with_optimizer(path),
        "fetch": fetch,
    }
