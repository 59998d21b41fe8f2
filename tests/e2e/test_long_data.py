"""A datum that two ranks compute together, through the wire, and again after one of them died."""

import os
import signal
import sqlite3
from pathlib import Path

import numpy as np
import pytest

import tinsmith
from clusters import RunningCluster, until_gone, until_health
from tinsmith import types
from tinsmithd.training.call import Composition
from tiny_models import write_tiny_model

TOKENS = 2500
"""More than a micro-batch has by default."""


SPREAD = b'{"ranks":2,"rounds":[[[[0,[0],2]],[]],[[[0,[1]]],[]]]}'
"""Both ranks compute the long datum, then one of them the short one."""


def compositions(folder: Path) -> set[bytes]:
    """In which calls were computed, as the journal has it."""
    with sqlite3.connect(folder / "journal.sqlite") as journal:
        rows = journal.execute("SELECT composition FROM calls WHERE composition != x''")
        return {batch for (found,) in rows for batch in Composition.decode(found).batches}


def data(seed: int) -> list[types.Datum]:
    """A long datum and a short one."""
    rng = np.random.default_rng(seed)
    return [
        types.Datum(
            types.ModelInput.from_ints(rng.integers(0, 256, tokens).tolist()),
            {
                "target_tokens": rng.integers(0, 256, tokens),
                "weights": rng.normal(size=tokens).astype(np.float32),
            },
        )
        for tokens in (TOKENS, 40)
    ]


def train(model: tinsmith.TrainingClient, cluster: RunningCluster, *, kill: bool) -> list[bytes]:
    """Two calls and a step for each; a rank may be killed while gradients are pending."""
    seen: list[bytes] = []
    for step in range(2):
        result = model.forward_backward(data(step), "cross_entropy").result(90)
        seen += [np.asarray(output["logprobs"]).tobytes() for output in result.loss_fn_outputs]
        seen.append(np.float64(result.loss).tobytes())
        if kill and step:
            old = cluster.rank_pids()
            os.kill(old[1], signal.SIGKILL)
            until_gone(old)
            until_health(cluster.address, serving=True)
        metrics = model.optim_step(types.AdamParams(learning_rate=1e-2)).result(90).metrics
        seen.append(np.float64(metrics["grad_norm:last"]).tobytes())
    result = model.forward(data(2), "cross_entropy").result(90)
    return [*seen, *(np.asarray(output["logprobs"]).tobytes() for output in result.loss_fn_outputs)]


@pytest.mark.timeout(200)
def test_a_long_datum_is_on_both_ranks_and_comes_back_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pending gradients are computed again in the same composition, as a twin's that nobody
    disturbed."""
    monkeypatch.setenv("TINSMITH_TRAINER_SEQUENCE_PARALLEL", "2")
    base_model = write_tiny_model(tmp_path / "model", context_length=4096)
    with RunningCluster(base_model, tmp_path, ranks=2) as cluster:
        service = tinsmith.ServiceClient(base_url=cluster.address)
        seen = []
        for kill in (True, False):
            model = service.create_lora_training_client(cluster.base_model, rank=2, seed=1)
            seen.append(train(model.result(90), cluster, kill=kill))
        assert seen[0] == seen[1]
    assert compositions(tmp_path / "training") >= {SPREAD}
