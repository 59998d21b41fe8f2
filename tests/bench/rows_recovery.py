"""Row 31: what a model that is waited for feels of idle ones when the ranks die."""

import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

import tinsmith
from bench.harness import Result, Timing, estimate
from bench.sides import Settings
from clusters import until_health
from faults.processes import Training
from tinsmith import types
from tiny_models import write_tiny_model

TARGET = 1.1
IDLE_MODELS = 20
STEPS = 15
"""Of each model before the ranks die: fewer than make a snapshot due."""
MEASURED = 20
"""Steps after that of the model that is waited for; the first one brings it back."""
TOKENS = 256
DATA = 8
WAIT_S_MAX = 300.0


class _User:
    """Trains a model, one step at a time."""

    def __init__(self, service: tinsmith.ServiceClient, name: str, seed: int) -> None:
        create = service.create_lora_training_client
        self._client = create(name, rank=8, seed=seed).result(WAIT_S_MAX)
        rows = np.random.default_rng(seed).integers(0, 256, (DATA, TOKENS + 1))
        weights = np.ones(TOKENS, np.float32)
        self._data = [
            types.Datum(
                types.ModelInput.from_ints(row[:-1].tolist()),
                {"target_tokens": row[1:], "weights": weights},
            )
            for row in rows
        ]

    def step(self) -> None:
        """Make one."""
        added = self._client.forward_backward(self._data, "cross_entropy")
        self._client.optim_step(types.AdamParams(learning_rate=1e-4)).result(WAIT_S_MAX)
        added.result(WAIT_S_MAX)


class _Side:
    """A Training server with ranks that can be killed; some models were trained and are idle."""

    def __init__(self, folder: Path, stack: ExitStack, threads: int, idle_models: int) -> None:
        base = write_tiny_model(folder / "tiny-llama", context_length=TOKENS)
        self._threads = threads
        self._training = stack.enter_context(Training(base, folder, snapshot_steps=STEPS + 1))
        self._start_ranks()
        service = tinsmith.ServiceClient(base_url=self._training.address)
        stack.enter_context(service)
        self._users = [_User(service, base.name, seed) for seed in range(idle_models + 1)]

    def _start_ranks(self) -> None:
        self._training.start_rank(threads=self._threads)
        until_health(self._training.address, serving=True)

    def recovers(self) -> Sequence[float]:
        """Seconds of the steps that one user makes after the ranks died and others came."""
        for user in self._users:
            for _ in range(STEPS):
                user.step()
        os.kill(self._training.ranks[-1].pid, signal.SIGKILL)
        until_health(self._training.address, serving=False)
        self._start_ranks()
        return [_seconds(self._users[0].step) for _ in range(MEASURED)]


def recovery(settings: Settings) -> list[Result]:
    """Steps after the ranks died, with idle models / without."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sides = [
            _Side(scratch / str(count), stack, settings.threads, count)
            for count in (IDLE_MODELS, 0)
        ]
        rounds = [[side.recovers() for side in sides] for _ in range(max(settings.pairs // 3, 3))]
    samples = np.array(rounds)  # (rounds, 2, MEASURED)
    return [
        Result(
            "31",
            f"step after the ranks died, {IDLE_MODELS} idle models / none",
            estimate(samples, lambda s: float(np.median(s[:, 0]) / np.median(s[:, 1]))),
            target=TARGET,
            sides={
                name: Timing(float(np.median(samples[:, index])), 0.0)
                for index, name in enumerate(("idle models", "none"))
            },
            notes=f"p50 of {samples[:, 0].size} steps each; the first one of a round, which brings "
            f"the model back, {np.median(samples[:, 0, 0]):.2f} s and "
            f"{np.median(samples[:, 1, 0]):.2f} s",
        )
    ]


def _seconds(call: Callable[[], None]) -> float:
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s
