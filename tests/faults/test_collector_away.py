"""A collector of spans that hangs, or is not there, is nothing to whoever trains and samples."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import tinsmith
from clusters import RunningCluster, until_gone
from collector import FAST, WAIT_S, collecting
from programs import environment
from tinsmith import types

TOKENS = [5, 6, 7, 8]
QUEUE = {"OTEL_BSP_MAX_QUEUE_SIZE": "8", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "4"}
"""So small that spans are dropped."""


@pytest.fixture
def nobody() -> Iterator[str]:
    """Where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def work(cluster: RunningCluster, base: str) -> list[object]:
    """Train, save and sample; all numbers that came."""
    with tinsmith.ServiceClient(base_url=cluster.address) as service:
        trainer = service.create_lora_training_client(base, rank=2, seed=1).result()
        inputs = {"target_tokens": np.array(TOKENS), "weights": np.ones(4, np.float32)}
        data = [types.Datum(types.ModelInput.from_ints(TOKENS), inputs)]
        metrics: list[object] = []
        for _ in range(12):
            passed = trainer.forward_backward(data, "cross_entropy")
            stepped = trainer.optim_step(types.AdamParams(learning_rate=1e-2))
            metrics += [passed.result().metrics, stepped.result().metrics]
        trainer.save_state("one").result()
        sampler = trainer.save_weights_and_get_sampling_client().result()
        params = types.SamplingParams(max_tokens=8, seed=1)
        prompt = types.ModelInput.from_ints(TOKENS)
        sampled = sampler.sample(prompt, 2, params).result()
        return [*metrics, [(each.tokens, each.logprobs) for each in sampled.sequences]]


def test_a_collector_that_hangs_or_is_not_there_changes_nothing(
    cluster: RunningCluster, tiny_model: Path, tmp_path: Path, nobody: str
) -> None:
    """Row 41: the Training server, its rank and the Sampler have one that takes spans and never
    answers; nobody is where the Checkpoint server sends its own. Numbers are those of a cluster
    without spans, and all servers end when they are asked to."""
    wanted = work(cluster, cluster.base_model)
    with collecting(hangs=True) as hanging:
        settings = {**FAST, **QUEUE}
        for name in ("TRAINING", "SAMPLER"):
            settings[f"TINSMITH_{name}_OTLP_ENDPOINT"] = hanging.endpoint
        settings["TINSMITH_CHECKPOINT_OTLP_ENDPOINT"] = nobody
        settings["TINSMITH_CHECKPOINT_LOG_FORMAT"] = "json"
        with environment(**settings):
            running = RunningCluster(tiny_model, tmp_path)
        with running as away:
            assert work(away, away.base_model) == wanted
            assert hanging.asked.wait(WAIT_S)
            pids = [away.pid(name) for name in away.addresses] + list(away.rank_pids())
        until_gone(pids)
        for line in (away.logs / "checkpoint.log").read_text().splitlines():
            json.loads(line)
        assert hanging.bodies == []
