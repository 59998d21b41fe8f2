"""When a client of this process lets go of weights that were saved without a name."""

import gc
import pickle
import time
import weakref
from collections.abc import Callable, Iterator

import pytest

import tinsmith
from faults.peer import Peer
from tinsmith import ModelInput, SamplingParams

PROMPT, PARAMS = ModelInput.from_ints([1, 2]), SamplingParams(max_tokens=4)
USES: dict[str, Callable[[tinsmith.SamplingClient], object]] = {
    "sample": lambda sampler: sampler.sample(PROMPT, 1, PARAMS).result(10),
    "sample_stream": lambda sampler: list(sampler.sample_stream(PROMPT, 1, PARAMS)),
    "pickle": pickle.dumps,
    "close": lambda sampler: sampler.close(),
}


@pytest.fixture(scope="module")
def trainer() -> Iterator[tinsmith.TrainingClient]:
    peer = Peer()
    peer.servicer.sample_breaks = 0
    peer.servicer.capabilities.base_models.add(name="base")
    yield (
        tinsmith.ServiceClient(base_url=peer.address).create_lora_training_client("base").result(20)
    )
    peer.stop()


@pytest.mark.parametrize("use", USES)
def test_a_dropped_client_is_gone_without_the_garbage_collector(
    trainer: tinsmith.TrainingClient, use: str
) -> None:
    """Nothing refers to it in a circle: a training loop's old weights wait for no collection."""
    gc.collect()
    gc.disable()
    try:
        sampler = trainer.save_weights_and_get_sampling_client().result(10)
        USES[use](sampler)
        dropped = weakref.ref(sampler)
        del sampler
        deadline_s = time.monotonic() + 20  # the loop's thread may be about to drop it, too
        while dropped() is not None and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert dropped() is None
    finally:
        gc.enable()
