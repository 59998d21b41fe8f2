"""How training clients end, and what becomes of their models."""

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

import tinsmith
from clusters import RunningCluster


@pytest.fixture
def trainer(service: tinsmith.ServiceClient, cluster: RunningCluster) -> tinsmith.TrainingClient:
    """A fresh model of its own."""
    return service.create_lora_training_client(cluster.base_model, rank=2, seed=1).result()


def is_there(service: tinsmith.ServiceClient, model_id: str) -> bool:
    runs = service.create_rest_client().list_training_runs(limit=1000).result().training_runs
    return model_id in [run.training_run_id for run in runs]


def test_a_block_deletes_its_model_and_keeps_its_checkpoints(
    service: tinsmith.ServiceClient, trainer: tinsmith.TrainingClient
) -> None:
    """Whatever was called inside is carried out first, waited for or not."""
    with trainer as inside:
        assert inside is trainer
        saved = trainer.save_state("last")
    assert not is_there(service, trainer.model_id)
    found = service.create_rest_client().list_checkpoints(trainer.model_id).result().checkpoints
    assert [c.tinker_path for c in found] == [saved.result().path]
    with pytest.raises(tinsmith.FailedPreconditionError, match="is closed") as refusal:
        trainer.save_state("more")
    assert refusal.value.reason == "CLIENT_CLOSED"
    trainer.close().result()


def test_a_block_for_coroutines_deletes_its_model(
    service: tinsmith.ServiceClient, trainer: tinsmith.TrainingClient
) -> None:
    """`async with` is the same."""

    async def run() -> None:
        async with trainer:
            await trainer.save_state("last")

    asyncio.run(run())
    assert not is_there(service, trainer.model_id)


def test_what_is_to_be_resumed_is_kept(
    service: tinsmith.ServiceClient, trainer: tinsmith.TrainingClient
) -> None:
    """By `keep`, inside a block too."""
    with trainer:
        trainer.close(keep=True).result()
    assert is_there(service, trainer.model_id)
    service.create_rest_client().delete_model(trainer.model_id).result()


def test_an_exception_keeps_the_model_and_says_so(
    service: tinsmith.ServiceClient, trainer: tinsmith.TrainingClient
) -> None:
    """Hours of training are not thrown away for a typo after them."""
    with pytest.raises(ZeroDivisionError) as raised, trainer:
        1 / 0  # noqa: B018
    assert trainer.model_id in raised.value.__notes__[0]
    assert is_there(service, trainer.model_id)
    trainer.delete().result()
    assert not is_there(service, trainer.model_id)


def test_a_call_that_fails_at_the_end_keeps_the_model(
    service: tinsmith.ServiceClient, trainer: tinsmith.TrainingClient
) -> None:
    """What it was to do is not lost with it, and the failure is heard of."""
    closing = threading.Event()

    def broken(data: Any, logprobs: Any) -> Any:
        assert closing.wait(60)
        raise RuntimeError("mine")

    inputs = {"target_tokens": np.array([2, 3]), "weights": np.ones(2, np.float32)}
    datum = tinsmith.Datum(tinsmith.ModelInput.from_ints([1, 2]), inputs)
    trainer.forward_backward_custom([datum], broken)
    closed = trainer.close()
    closing.set()
    with pytest.raises(RuntimeError, match="mine"):
        closed.result()
    assert is_there(service, trainer.model_id)
    trainer.delete().result()


def test_a_model_can_be_deleted_by_its_id(
    service: tinsmith.ServiceClient, trainer: tinsmith.TrainingClient
) -> None:
    """Once; by then everybody hears that it is gone."""
    rest = service.create_rest_client()
    rest.delete_model(trainer.model_id).result()
    for late in (rest.delete_model(trainer.model_id), trainer.save_state("late")):
        with pytest.raises(tinsmith.NotFoundError) as refusal:
            late.result()
        assert refusal.value.reason == "MODEL_NOT_FOUND"
