"""Our side of the sampling rows: a cluster as `tinsmith up` runs it, and the public client."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

import tinsmith
from bench.clocks import cpu_clock
from bench.sampling_workloads import Call, random_tokens
from bench.sides import Settings
from clusters import RunningCluster
from tinsmith import types
from tinsmithd.sampler.engines.transformers.dtype import resolved_dtype
from tinsmithd.sampler.engines.transformers.native import can_be_had

RANK = 16
LEARNING_RATE = 1e-3
STEP_TOKENS = 16
WAIT_S_MAX = 900.0


def default_dtype() -> str:
    """What `dtype = "auto"` is for a Sampler of this machine."""
    return resolved_dtype("auto", compiled=lambda: can_be_had(""), on_progress=print)


def prompt_of(call: Call) -> types.ModelInput:
    """A call's prompt."""
    return types.ModelInput.from_ints(list(call.prompt))


def params_of(call: Call) -> types.SamplingParams:
    """How it is drawn: temperature 1, no stop."""
    return types.SamplingParams(max_tokens=call.new_tokens, seed=call.seed, stop=[])


class Served:
    """A cluster and a client of it, each server a process of its own; a context manager.

    Args:
        settings: Of the run.
        dtype: Of the base model; None is what a Sampler takes here by default.

    Attributes:
        service: The client.
        dtype: That of the base model.
        cpu_clock: CPU seconds of the Sampler so far.
        base_model: Its name.
    """

    def __init__(self, settings: Settings, dtype: str | None = None) -> None:
        self._stack, self.dtype = ExitStack(), dtype or default_dtype()
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            running = stack.enter_context(
                RunningCluster(
                    settings.base_model, Path(folder), threads=settings.threads, dtype=self.dtype
                )
            )
            self.service = stack.enter_context(tinsmith.ServiceClient(base_url=running.address))
            self._stack = stack.pop_all()
        self.base_model = running.base_model
        self.cpu_clock: Callable[[], float] = cpu_clock([running.pid("sampler")], own=False)

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def base(self) -> tinsmith.SamplingClient:
        """Samples from the base model itself."""
        return self.service.create_sampling_client(base_model=self.base_model).result(WAIT_S_MAX)

    def trainer(self, seed: int) -> tinsmith.TrainingClient:
        """A model with an adapter on all linear layers but the head, which one step has moved."""
        create = self.service.create_lora_training_client
        trainer = create(self.base_model, rank=RANK, seed=seed, train_unembed=False).result(
            WAIT_S_MAX
        )
        train(trainer, seed)
        return trainer

    def adapter(self, seed: int) -> tinsmith.SamplingClient:
        """Samples from such a model, which the Sampler has loaded."""
        client = self.trainer(seed).save_weights_and_get_sampling_client().result(WAIT_S_MAX)
        sample(client, [Call(random_tokens(STEP_TOKENS, seed), 1)])
        return client


def train(trainer: tinsmith.TrainingClient, seed: int) -> None:
    """One step on a few random tokens; all weights are others afterwards."""
    row = random_tokens(STEP_TOKENS + 1, seed)
    inputs = {"target_tokens": np.array(row[1:]), "weights": np.ones(STEP_TOKENS, np.float32)}
    trainer.forward_backward(
        [types.Datum(types.ModelInput.from_ints(row[:-1]), inputs)], "cross_entropy"
    )
    trainer.optim_step(types.AdamParams(learning_rate=LEARNING_RATE)).result(WAIT_S_MAX)


def sample(
    clients: tinsmith.SamplingClient | Sequence[tinsmith.SamplingClient], calls: Sequence[Call]
) -> list[types.SampleResponse]:
    """Make calls at once and wait for all; several clients take turns.

    Raises:
        AssertionError: A sequence is not as long as was asked.
    """
    clients = clients if isinstance(clients, Sequence) else [clients]
    futures = [
        clients[index % len(clients)].sample(prompt_of(call), call.num_samples, params_of(call))
        for index, call in enumerate(calls)
    ]
    answers = [future.result(WAIT_S_MAX) for future in futures]
    for call, answer in zip(calls, answers, strict=True):
        assert len(answer.sequences) == call.num_samples
        assert all(len(made.tokens_np) == call.new_tokens for made in answer.sequences)
    return answers
