"""What is not used any more goes, and what is used stays: weights of training loops."""

import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import tinsmith
from clusters import RunningCluster
from faults.amount import amount
from tinsmith import AdamParams, Datum, ModelInput, SamplingParams

SAVES = amount(40, full=1000)
LEASE_S = 2.0
PROMPT = ModelInput.from_ints([5, 6, 7])


class Lifetimes:
    """A cluster whose leases are short."""

    def __init__(self, running: RunningCluster, data: Path) -> None:
        self.service = tinsmith.ServiceClient(running.address)
        self.base_model = running.base_model
        self._blobs = data / "checkpoints" / "blobs"

    def bytes_on_disk(self) -> int:
        """Of all checkpoints, as the disk has them."""
        return sum(path.stat().st_size for path in self._blobs.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def lifetimes(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lifetimes]:
    """One cluster for this file."""
    data = tmp_path_factory.mktemp("lifetimes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINSMITH_CHECKPOINT_LEASE_S", str(LEASE_S))
        with RunningCluster(tiny_model, data) as running:
            yield Lifetimes(running, data)


def round_of(trainer: tinsmith.TrainingClient, seed: int) -> tinsmith.SamplingClient:
    """One round of a training loop: gradients, a step, and weights to sample from."""
    tokens = np.random.default_rng(seed).integers(0, 256, 9)
    inputs = {"target_tokens": tokens[1:], "weights": np.ones(8, np.float32)}
    trainer.forward_backward(
        [Datum(ModelInput.from_ints(tokens[:-1].tolist()), inputs)], "cross_entropy"
    )
    trainer.optim_step(AdamParams(learning_rate=0.01))
    return trainer.save_weights_and_get_sampling_client().result()


def tokens_of(sampler: tinsmith.SamplingClient) -> list[int]:
    params = SamplingParams(max_tokens=4, seed=1, stop=[])
    return list(sampler.sample(PROMPT, 1, params).result().sequences[0].tokens)


def until(true: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.1)


@pytest.mark.timeout(max(120, 4 * SAVES))
def test_ephemeral_weights_are_reclaimed_when_nobody_holds_them(lifetimes: Lifetimes) -> None:
    """An RL loop keeps three sets at most: its own, one that a client holds, and one on its way.

    A copy of a client in another process holds, too; a deleted model leaves nothing behind.
    """
    before = lifetimes.bytes_on_disk()
    made = lifetimes.service.create_lora_training_client(lifetimes.base_model, rank=4, seed=1)
    trainer = made.result()
    first = sampler = round_of(trainer, 0)
    held = pickle.dumps(first), tokens_of(first)
    one_set = lifetimes.bytes_on_disk() - before
    assert one_set > 0
    for seed in range(1, SAVES):
        sampler = round_of(trainer, seed)
        assert len(tokens_of(sampler)) == 4
    newest = tokens_of(sampler)

    def sets() -> float:
        return (lifetimes.bytes_on_disk() - before) / one_set

    print(f"{SAVES} saves of {one_set} bytes: {sets():.2f} sets on disk at the end of the loop")
    until(lambda: sets() < 2.5, f"{sets():.1f} sets are on disk")
    print(f"{sets():.2f} sets after that, with 2 live clients")
    assert tokens_of(first) == held[1]
    copy = pickle.loads(held[0])
    first.close()
    del first
    time.sleep(2 * LEASE_S)
    assert tokens_of(copy) == held[1]
    assert tokens_of(sampler) == newest
    copy.close()
    until(lambda: sets() < 1.5, f"{sets():.1f} sets are on disk")
    with pytest.raises(tinsmith.NotFoundError, match="reclaimed when no client holds them"):
        tokens_of(copy)
    trainer.delete().result()
    time.sleep(2 * LEASE_S)
    assert tokens_of(sampler) == newest
    del sampler
    until(lambda: sets() < 0.5, f"{sets():.1f} sets are on disk")
