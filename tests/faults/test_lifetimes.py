"""What is not used any more goes, and what is used stays: weights of training loops, and models."""

import contextlib
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import tinsmith
from clusters import RunningCluster
from faults.amount import amount
from tinsmith import AdamParams, Datum, ModelInput, SamplingParams
from tinsmith import v1 as pb
from tinsmith.cluster import connect

SAVES = amount(40, full=1000)
LEASE_S = amount(8.0, full=10.0)
"""Longer than a few rounds of a loop: what goes before was given back, and did not run out. Renewed
three times meanwhile, so a machine may stand still for more than half of it."""
SETS_MAX = 3
"""Sets of weights on disk for each live client of a training loop."""
SETTLE_S = LEASE_S / 2
"""How long after a save there may be more, where the machine is busy; less than any lease has left
when it is renewed for the last time."""
MODELS, MODELS_MAX = amount((7, 2), full=(200, 64))
ROUNDS = 2
PROMPT = ModelInput.from_ints([5, 6, 7])


class Lifetimes:
    """A cluster, such as one with short leases and few seats."""

    def __init__(self, running: RunningCluster, data: Path) -> None:
        self.service = tinsmith.ServiceClient(base_url=running.address)
        self.address = running.address
        self.base_model = running.base_model
        self._running = running
        self._blobs = data / "checkpoints" / "blobs"

    def bytes_on_disk(self) -> int:
        """Of all checkpoints, as the disk has them."""
        found = 0
        for path in self._blobs.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):  # it was reclaimed just now
                found += path.stat().st_size
        return found

    def restart(self) -> None:
        """The Training server dies, and its ranks with it; both are started again."""
        os.kill(self._running.pid("training"), signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(cluster: RunningCluster) -> Lifetimes:
    """One in which there is a seat for each."""
    return Lifetimes(cluster, Path())


@pytest.fixture(scope="module")
def lifetimes(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lifetimes]:
    """One cluster for this file."""
    data = tmp_path_factory.mktemp("lifetimes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINSMITH_CHECKPOINT_LEASE_S", str(LEASE_S))
        patch.setenv("TINSMITH_TRAINING_MODELS_MAX", str(MODELS_MAX))
        patch.setenv("TINSMITH_TRAINING_SUSPEND_IDLE_S", "0")
        with RunningCluster(tiny_model, data, keep=True) as running:
            yield Lifetimes(running, data)


def data_of(seed: int) -> list[Datum]:
    tokens = np.random.default_rng(seed).integers(0, 256, 9)
    inputs = {"target_tokens": tokens[1:], "weights": np.ones(8, np.float32)}
    return [Datum(ModelInput.from_ints(tokens[:-1].tolist()), inputs)]


def round_of(trainer: tinsmith.TrainingClient, seed: int) -> tinsmith.SamplingClient:
    """One round of a training loop: gradients, a step, and weights to sample from."""
    trainer.forward_backward(data_of(seed), "cross_entropy")
    trainer.optim_step(AdamParams(learning_rate=0.01))
    return trainer.save_weights_and_get_sampling_client().result()


def tokens_of(sampler: tinsmith.SamplingClient) -> list[int]:
    params = SamplingParams(max_tokens=4, seed=1, stop=[])
    return list(sampler.sample(PROMPT, 1, params).result().sequences[0].tokens)


def until(true: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline_s = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.1)


@pytest.mark.timeout(max(120, 4 * SAVES))
def test_ephemeral_weights_are_reclaimed_when_nobody_holds_them(lifetimes: Lifetimes) -> None:
    """An RL loop keeps three sets at most: its own, the one before, and one on its way.

    That is so after every save, long before a lease runs out. A copy of a client in another
    process holds, too; a deleted model leaves nothing behind.
    """
    before = lifetimes.bytes_on_disk()
    made = lifetimes.service.create_lora_training_client(lifetimes.base_model, rank=4, seed=1)
    trainer = made.result()
    first = sampler = round_of(trainer, 0)
    held = pickle.dumps(first), tokens_of(first)
    one_set = lifetimes.bytes_on_disk() - before
    assert one_set > 0

    def sets() -> float:
        return (lifetimes.bytes_on_disk() - before) / one_set

    live = 2  # the first client, and the newest one
    seen = []
    for seed in range(1, SAVES):
        sampler = round_of(trainer, seed)
        seen.append(sets())
        until(lambda: sets() <= SETS_MAX * live, f"{sets():.1f} sets after save {seed}", SETTLE_S)
        assert len(tokens_of(sampler)) == 4
    saved_s = time.monotonic()
    late = sum(there > SETS_MAX * live for there in seen)
    print(f"{SAVES} saves of {one_set} bytes, {live} live clients: sets on disk after each save")
    print(f"  mean {np.mean(seen):.2f}, most {max(seen):.2f}, after the last {seen[-1]:.2f}")
    print(f"  {late} times more than {SETS_MAX} for each live client, and then for a moment only")
    until(lambda: sets() < live + 0.5, f"{sets():.1f} sets are on disk", SETTLE_S)
    print(f"  {sets():.2f} sets {time.monotonic() - saved_s:.2f} s after the loop")
    newest = tokens_of(sampler)
    assert tokens_of(first) == held[1]
    copy = pickle.loads(held[0])
    first_path = str(first.model_path)
    first.close()
    del first
    trainer.delete().result()
    time.sleep(1.5 * LEASE_S)
    assert tokens_of(copy) == held[1]
    assert tokens_of(sampler) == newest
    copy.close()
    until(lambda: sets() < 1.5, f"{sets():.1f} sets are on disk")
    # The Sampler may have them in memory still, and serves a client that is pinned to them.
    gone = lifetimes.service.create_rest_client().get_weights_info_by_tinker_path(first_path)
    with pytest.raises(tinsmith.NotFoundError, match="reclaimed when no client holds them"):
        gone.result()
    assert tokens_of(sampler) == newest
    del sampler
    until(lambda: sets() < 0.5, f"{sets():.1f} sets are on disk")


def test_a_request_under_way_outlives_its_client(lifetimes: Lifetimes) -> None:
    """It gets all its tokens, from weights that stay until it ends and then go."""
    made = lifetimes.service.create_lora_training_client(lifetimes.base_model, rank=4, seed=2)
    trainer = made.result()
    params = SamplingParams(max_tokens=40, seed=1, stop=[])
    sampler, newer = round_of(trainer, 0), round_of(trainer, 1)
    whole = list(sampler.sample(PROMPT, 1, params).result().sequences[0].tokens)
    stream = sampler.sample_stream(PROMPT, 1, params)
    tokens = list(next(stream).tokens)
    sampler.close()
    for part in stream:
        tokens += part.tokens
    assert tokens == whole
    newer.close()
    trainer.delete().result()
    until(lambda: trainer.model_id not in models_with_weights(lifetimes), "weights stay")


# --- models -----------------------------------------------------------------------------------


def half_a_round(trainer: tinsmith.TrainingClient, seed: int) -> list[float]:
    """Gradients that wait, over those of the round before; every other round ends with a step."""
    done = trainer.forward_backward(data_of(seed), "cross_entropy").result()
    if seed % 2:
        params = AdamParams(learning_rate=0.05, eps=0.1)
        trainer.optim_step(params).result()
    return [float(value) for value in done.loss_fn_outputs[0]["logprobs"].to_numpy()]


def created(lifetimes: Lifetimes, index: int) -> tinsmith.TrainingClient:
    """A model that differs from the others, in its shape as well."""
    service, base = lifetimes.service, lifetimes.base_model
    return service.create_lora_training_client(base, rank=2 + 2 * (index % 2), seed=index).result()


@pytest.mark.timeout(max(180, 6 * MODELS))
def test_a_run_can_be_repeated_any_number_of_times(
    lifetimes: Lifetimes, undisturbed: Lifetimes
) -> None:
    """More models than there are seats, used in turn: each as if it had been alone, bit for bit.

    Gradients that wait move with their model, and nobody has to delete anything.
    """
    trainers = [created(lifetimes, index) for index in range(MODELS)]
    found: list[list[list[float]]] = [[] for _ in trainers]
    for turn in range(2 * ROUNDS):
        for index, trainer in enumerate(trainers):
            found[index].append(half_a_round(trainer, 100 * index + turn))
    suspended = states_of(lifetimes).count(pb.ModelState.MODEL_STATE_SUSPENDED)
    assert suspended >= MODELS - MODELS_MAX
    saved = [trainer.save_state("end").result().path for trainer in trainers]
    for index, trainer in enumerate(trainers):
        with created(undisturbed, index) as twin:
            alone = [half_a_round(twin, 100 * index + turn) for turn in range(2 * ROUNDS)]
            assert found[index] == alone, f"model {index}"
            path = twin.save_state("end").result().path
            assert files_of(lifetimes, saved[index]) == files_of(undisturbed, path), (
                f"model {index}"
            )
        trainer.delete().result()
    print(f"{MODELS} models in {MODELS_MAX} seats, {suspended} suspended at the end: all the same")


def test_a_model_that_trains_all_weights_shares_the_ranks_with_others(
    lifetimes: Lifetimes, undisturbed: Lifetimes
) -> None:
    """It moves to disk when another is called, comes back when it is, and stops nobody."""
    service, base = lifetimes.service, lifetimes.base_model
    found: dict[str, list[list[float]]] = {"full": [], "lora": []}
    with (
        service.create_full_training_client(base).result() as full,
        service.create_lora_training_client(base, rank=4, seed=1).result() as lora,
    ):
        for turn in range(4):
            found["full"].append(half_a_round(full, turn))
            found["lora"].append(half_a_round(lora, turn))
    service, base = undisturbed.service, undisturbed.base_model
    with service.create_full_training_client(base).result() as full:
        assert found["full"] == [half_a_round(full, turn) for turn in range(4)]
    with service.create_lora_training_client(base, rank=4, seed=1).result() as lora:
        assert found["lora"] == [half_a_round(lora, turn) for turn in range(4)]


def test_models_stay_suspended_over_a_restart_and_come_back_when_called(
    lifetimes: Lifetimes,
) -> None:
    """Nobody waits for any of them, so all stay there until they are called."""
    trainers = [created(lifetimes, index) for index in range(MODELS_MAX + 2)]
    first = [half_a_round(trainer, 7) for trainer in trainers]
    lifetimes.restart()
    until(
        lambda: states_of(lifetimes).count(pb.ModelState.MODEL_STATE_SUSPENDED) >= len(trainers),
        "not suspended",
    )
    for trainer, before in zip(trainers, first, strict=True):
        assert half_a_round(trainer, 7) != before  # a step was made
        trainer.delete().result()


def models_with_weights(lifetimes: Lifetimes) -> set[str]:
    with connect(lifetimes.address) as stubs:  # to list them uses none
        listed = stubs.checkpoint.ListCheckpoints(pb.ListCheckpointsRequest(page_size=1000))
        return {checkpoint.model_id for checkpoint in listed.checkpoints}


def states_of(lifetimes: Lifetimes) -> list[int]:
    with connect(lifetimes.address) as stubs:
        listed = stubs.training.ListModels(pb.ListModelsRequest(page_size=1000))
        return [model.state for model in listed.models]


def files_of(lifetimes: Lifetimes, path: str) -> dict[str, bytes]:
    """SHA-256 of a checkpoint's files."""
    with connect(lifetimes.address) as stubs:
        found = stubs.checkpoint.GetCheckpoint(
            pb.GetCheckpointRequest(checkpoint_path=path)
        ).checkpoint
        return {file.name: file.sha256 for file in found.files}
