"""What happens when memory does not suffice: a real limit on a real process."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from memory_worker import AGAIN

import programs
from data import collect, make_data
from engines import make_engine
from tinsmithd.domain import LoraConfig
from tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that takes long sequences."""
    return write_tiny_model(tmp_path_factory.mktemp("long") / "model", context_length=100_000)


def run(folder: Path, case: str, ranks: int = 1) -> tuple[Any, str]:
    """What the worker found, one after the other where there are several, and what was logged."""
    done = programs.run("memory_worker", str(folder), case, ranks=ranks, forked=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("found ")]
    found = [json.loads(line.removeprefix("found ")) for line in lines]
    return (found[0] if ranks == 1 else found), done.stderr


def test_out_of_memory_splits_and_computes_the_same(folder: Path) -> None:
    """The loss to 1e-5 and the weights after a step to 1e-5, with a third of the memory; the next
    call does not try again what did not fit."""
    enough, log = run(folder, "enough")
    assert "out of memory" not in log
    short, log = run(folder, "short")
    first, _, again = log.partition(AGAIN)
    assert "out of memory with 40 data" in first
    assert "out of memory" not in again
    np.testing.assert_allclose(short[0], enough[0], rtol=1e-5)
    np.testing.assert_allclose(short[1], enough[1], atol=1e-5)


def test_what_does_not_fit_is_refused_whole(folder: Path) -> None:
    """The error says which datum; the next step applies what waited before, and nothing of it."""
    (reason, message, norms), log = run(folder, "long")
    assert "with recomputation" in log
    assert reason == "OUT_OF_MEMORY"
    assert message.startswith("a datum of 20000 tokens does not fit into the trainer's memory")
    assert norms[0] == norms[1] > 0


def test_ranks_stay_in_step_when_one_runs_out_of_memory(folder: Path) -> None:
    """The long datum is on one of two ranks: both refuse the call, and both go on to a step."""
    both, _ = run(folder, "long", ranks=2)
    assert [reason for reason, _, _ in both] == ["OUT_OF_MEMORY"] * 2
    messages = sorted(message for _, message, _ in both)
    assert messages[0].startswith("a datum of 20000 tokens")
    assert messages[1].startswith("a datum of this call does not fit into the memory of another")
    assert all(norms[0] == norms[1] > 0 for _, _, norms in both)


def test_a_probe_without_memory_lets_layers_be_recomputed(folder: Path) -> None:
    """Finding out what a token keeps takes memory itself; the call is computed all the same."""
    logprobs = []
    for settings in ({"activation_bytes_max": 1}, {"activation_bytes_max": 1 << 30}):
        engine = make_engine("deepspeed", str(folder), dtype="float32", zero_stage=1, **settings)
        probed: list[int] = []

        def refuse(_: Any, arguments: Any, named: Any, probed: list[int] = probed) -> None:
            if "segment_lengths" not in named:  # those of data have them
                probed.append(named["input_ids"].shape[1])
                torch.empty(1 << 60)

        engine.engine._base.model.model.register_forward_pre_hook(refuse, with_kwargs=True)
        engine.create_model("m", LoraConfig(rank=2, seed=7))
        for _ in range(2):
            logprobs.append(collect(engine, "m", make_data(0, 3), backward=True))
        assert len(probed) == 2  # and it is tried again
    for _, found in logprobs:
        for ours, first in zip(found, logprobs[0][1], strict=True):
            np.testing.assert_array_equal(ours, first)
