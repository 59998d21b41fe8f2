"""kill -9 at a given place in the code, once; the user sees the numbers of an undisturbed run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinsmith
from clusters import RunningCluster
from faults.amount import FULL
from faults.harness import victims_of
from faults.script import make_data
from faults.users import delete_models, read_files
from faults.victims import RANK_POINTS, TRAINING_POINTS, Victims, alive, wait_until
from tinsmith import types
from tinsmithd import failpoints

STEPS = 8
SNAPSHOT_STEPS = 3
ROWS = {
    **dict.fromkeys(("mid_forward", "mid_backward", "mid_deposit"), 2),
    **dict.fromkeys(("pre_optim", "mid_optim"), 3),
    **dict.fromkeys(("post_optim_pre_ack", "pre_result", "post_result_pre_ack"), 4),
    **dict.fromkeys(("recv", "wal_append", "wal_fsync", "enqueue"), 5),
    **dict.fromkeys(("snapshot_mid_write", "snapshot_pre_rename", "snapshot_post_rename"), 1),
    "restore_mid": 9,
}
"""Row of the fault matrix that each failpoint stands for."""
ALWAYS = (
    *("mid_backward", "mid_optim", "post_result_pre_ack", "wal_fsync"),
    *("snapshot_pre_rename", "restore_mid"),
)
"""One of each row; `make faults` takes all."""
Seen = tuple[list[Any], dict[str, bytes]]
CHOSEN = [name for name in ROWS if FULL or name in ALWAYS]


@pytest.fixture(scope="module")
def running(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RunningCluster, Victims]]:
    """Calls have parts to be killed between."""
    settings = {
        "TINSMITH_TRAINING_SNAPSHOT_STEPS": str(SNAPSHOT_STEPS),
        "TINSMITH_TRAINER_MICRO_BATCH_TOKENS_MAX": "24",
    }
    with victims_of(tiny_model, tmp_path_factory.mktemp("kept"), **settings) as found:
        yield found


@pytest.fixture(scope="module")
def kept(running: tuple[RunningCluster, Victims]) -> RunningCluster:
    """A cluster that starts again what dies."""
    return running[0]


@pytest.fixture(scope="module")
def victims(running: tuple[RunningCluster, Victims]) -> Victims:
    """The cluster's processes."""
    return running[1]


def create(cluster: RunningCluster) -> tinsmith.TrainingClient:
    service = tinsmith.ServiceClient(base_url=cluster.address)
    return service.create_lora_training_client(cluster.base_model, rank=2, seed=1).result(100)


def train(client: tinsmith.TrainingClient, first: int, last: int) -> list[Any]:
    """Steps of two calls that add gradients, one that adds none, and the step, all sent at once."""
    rng = np.random.default_rng(first)
    futures: list[Any] = []
    for step in range(first, last):
        for _ in range(2):
            futures.append(client.forward_backward(make_data(rng, 3, 12), "cross_entropy"))
        futures.append(client.forward(make_data(rng, 3, 12), "cross_entropy"))
        futures.append(client.optim_step(types.AdamParams(learning_rate=1e-2 / step)))
    return [values(future.result(100)) for future in futures]


def values(answer: Any) -> Any:
    outputs = getattr(answer, "loss_fn_outputs", [])
    logprobs = [np.asarray(output["logprobs"]).tobytes() for output in outputs]
    return sorted(answer.metrics.items()), logprobs


def saved(cluster: RunningCluster, client: tinsmith.TrainingClient) -> dict[str, bytes]:
    """Adapter and optimizer state as they are."""
    path = client.save_state("state").result(100).path
    return read_files(cluster.addresses["checkpoint"], path)


@pytest.fixture(scope="module")
def undisturbed(kept: RunningCluster) -> Seen:
    """What the calls give, and the state after them."""
    client = create(kept)
    seen = train(client, 1, STEPS // 2 + 1) + train(client, STEPS // 2 + 1, STEPS + 1)
    return seen, saved(kept, client)


def test_every_failpoint_of_ranks_and_training_stands_for_a_row() -> None:
    """A place that is added has to be killed at, too."""
    assert set(ROWS) == {*RANK_POINTS, *TRAINING_POINTS}
    others = set(failpoints.NAMES) - set(ROWS)
    assert all(n.startswith(("ckpt_", "sampler_", "import_", "migrate_")) for n in others)


@pytest.mark.parametrize("name", [pytest.param(n, id=f"row {ROWS[n]}, {n}") for n in CHOSEN])
def test_a_kill_at_this_place_changes_no_number(
    kept: RunningCluster,
    victims: Victims,
    undisturbed: tuple[list[Any], dict[str, bytes]],
    name: str,
) -> None:
    """Whole or not at all, once, and nothing acknowledged is lost: each value, and the state that
    is saved in the end, are those of a run in which nobody died."""
    client = create(kept)
    seen = train(client, 1, STEPS // 2 + 1)
    kind = victims.arm(name, at=1 if name.startswith(("snapshot_", "restore_")) else 3)
    victims.kill_process(kind)
    seen += train(client, STEPS // 2 + 1, STEPS + 1)
    state = saved(kept, client)
    pid = victims.armed_pid(kind)
    assert pid is not None, "nobody took the failpoint"
    wait_until(lambda: not alive(pid))
    delete_models(kept.address)
    assert seen == undisturbed[0]
    assert state == undisturbed[1]
