"""Answers outlive the process that gave them."""

import os
import signal
import time
from pathlib import Path

from answers import answer, calls_of
from clusters import RunningCluster, until_health
from tinsmith import v1 as pb
from tinsmith.cluster import connect


def test_answers_are_there_after_a_kill(tiny_model: Path, tmp_path: Path) -> None:
    """kill -9 to the Training server: every kind of call is answered again, byte for byte."""
    with (
        RunningCluster(tiny_model, tmp_path, engine="reference", keep=True) as cluster,
        connect(cluster.address) as stubs,
    ):
        lora = pb.CreateModelRequest(lora_config=pb.LoraConfig(rank=2, seed=1))
        model_id = stubs.training.CreateModel(lora).model.model_id
        given = calls_of(stubs, model_id)
        before = [answer(stubs, model_id, seq_id) for seq_id in range(1, len(given) + 1)]
        old = cluster.pid("training")
        os.kill(old, signal.SIGKILL)
        while cluster.pid("training") == old:
            time.sleep(0.01)
        until_health(cluster.address, serving=True)
        after = [answer(stubs, model_id, seq_id) for seq_id in range(1, len(given) + 1)]
        assert after == before
        for case, messages, found in zip(given, given.values(), after, strict=True):
            assert [getattr(message, case) for message in found] == messages
