"""kill -9 of one of two Samplers under load: every call ends with what its seed stands for."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

import tinsmith
from clusters import SERVICES, RunningCluster, until_health
from cutting_proxy import CuttingProxy
from faults.processes import Process, hung
from faults.victims import wait_until

CALLS = 16
SEQUENCES = 2
TOKENS = 300
BEGUN_BYTES = 2000
"""Of the answers of half the calls, 60 KB together: so much comes before the kill, and no more than
what is read at once, 16 KB."""


def made_by(
    sampler: tinsmith.SamplingClient, index: int
) -> tuple[list[list[int]], list[list[float]]]:
    """Two sequences, streamed where `index` is odd: tokens and logprobs of each."""
    prompt = tinsmith.ModelInput.from_ints([1 + index % 5, 7, 9])
    params = tinsmith.SamplingParams(max_tokens=TOKENS, seed=index, stop=[])
    if index % 2 == 0:
        found = sampler.sample(prompt, SEQUENCES, params).result(90).sequences
        return [list(s.tokens) for s in found], [list(s.logprobs or ()) for s in found]
    tokens: list[list[int]] = [[], []]
    logprobs: list[list[float]] = [[], []]
    for part in sampler.sample_stream(prompt, SEQUENCES, params):
        tokens[part.sequence_index] += list(part.tokens)
        logprobs[part.sequence_index] += list(part.logprobs)
    return tokens, logprobs


def under_way(sampler: tinsmith.SamplingClient) -> int:
    """How many sequences a client has asked for and not got."""
    replicas = sampler._connection._samplers._replicas
    return sum(replica.sequences for replica in replicas.values())


def kill_in_the_middle(proxy: CuttingProxy, victim: Process) -> None:
    """Let a Sampler die once callers have something of its answers, however fast it makes them."""
    enough = proxy.received + BEGUN_BYTES

    def kill(received: int) -> bool:
        if proxy.refuses or received < enough:
            return False
        proxy.refuses = True
        os.kill(victim.pid, signal.SIGKILL)
        return True

    proxy.cut_after = kill


def test_calls_end_with_what_their_seeds_stand_for(
    cluster: RunningCluster,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With an adapter: whole answers and streams, tokens and the bits of their logprobs. Nothing of
    a call is made before all of them are under way."""
    settings = {"base_model": tiny_model, "checkpoint_target": cluster.addresses["checkpoint"]}
    with (
        Process("sampler", tmp_path, settings, OMP_NUM_THREADS="1") as victim,
        Process("sampler", tmp_path, settings, OMP_NUM_THREADS="1") as other,
    ):
        addresses = [f"127.0.0.1:{each.port}" for each in (victim, other)]
        for address in addresses:
            until_health(address, serving=True, service=SERVICES["sampler"])
        model = (
            tinsmith.ServiceClient(base_url=cluster.address)
            .create_lora_training_client(cluster.base_model, rank=4, seed=1)
            .result()
        )
        datum = tinsmith.Datum(
            tinsmith.ModelInput.from_ints([1, 2, 3]),
            {"target_tokens": np.array([2, 3, 4]), "weights": np.ones(3, np.float32)},
        )
        model.forward_backward([datum], "cross_entropy")
        model.optim_step(tinsmith.AdamParams(learning_rate=0.1)).result()
        path = model.save_weights_for_sampler("served").result().path

        def client_of(address: str) -> tinsmith.SamplingClient:
            monkeypatch.setenv("TINSMITH_ADDRESS_SAMPLER", address)
            service = tinsmith.ServiceClient(base_url=cluster.address)
            return service.create_sampling_client(path).result()

        with ThreadPoolExecutor(CALLS) as pool, ExitStack() as stack:
            alone = client_of(addresses[1])
            undisturbed = list(pool.map(lambda index: made_by(alone, index), range(CALLS)))
            proxy = stack.enter_context(CuttingProxy(addresses[0]))
            both = client_of(f"{proxy.address},{addresses[1]}")
            first = both.sample_stream(
                tinsmith.ModelInput.from_ints([5]), 1, tinsmith.SamplingParams(max_tokens=2)
            )
            assert list(first)
            caplog.set_level("DEBUG", "tinsmith")
            with hung(victim.pid, other.pid):
                calls = [pool.submit(made_by, both, index) for index in range(CALLS)]
                wait_until(lambda: under_way(both) == CALLS * SEQUENCES)
                kill_in_the_middle(proxy, victim)
            disturbed = [call.result(90) for call in calls]
    moved = [record for record in caplog.records if "moves" in record.message]
    assert len(moved) >= 3, "it was under load"
    for index, (ours, theirs) in enumerate(zip(disturbed, undisturbed, strict=True)):
        assert [len(tokens) for tokens in ours[0]] == [TOKENS, TOKENS]
        assert ours == theirs, f"call {index}"
