"""Processes and connections die under callers who wait; who waits gets what was asked for."""

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence

import grpc
import numpy as np
import pytest

import tinsmith
from clusters import RunningCluster, until_health
from cutting_proxy import CuttingProxy
from faults.operations import LOSSES, make_datum
from faults.processes import hung
from faults.proxy import ChaosProxy
from tinsmith import tensors, types
from tinsmith import v1 as pb
from tinsmith.cluster import connect
from tinsmith.v1 import types_pb2
from tinsmithd.up import SERVICES
from tiny_models import write_tiny_model

ADAM = types.AdamParams(learning_rate=1e-2)
PROMPT = [1, 2, 3]
LONG = 1000
"""Tokens of a sample that takes a while."""
SAMPLES, BEGUN_BYTES = 4, 4000
"""So many samples are answered with 48 KB. So much has come before a Sampler dies, and no more than
what is read at once, 16 KB."""
Tokens = dict[int, list[int]]
"""Tokens of samples, by their index."""


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """A cluster that starts again what dies."""
    folder = tmp_path_factory.mktemp("kept")
    model = write_tiny_model(folder / "tiny-llama", context_length=2 * LONG)
    with RunningCluster(model, folder / "cluster", keep=True) as running:
        yield running


def kill(cluster: RunningCluster, name: str) -> None:
    os.kill(cluster.pid(name), signal.SIGKILL)


def data(seed: int = 0, count: int = 2) -> list[types.Datum]:
    rows = np.random.default_rng(seed).integers(0, 256, (count, 9))
    return [
        types.Datum(
            types.ModelInput.from_ints(row[:-1].tolist()),
            {"target_tokens": row[1:], "weights": np.ones(8, np.float32)},
        )
        for row in rows
    ]


def values(output: types.ForwardBackwardOutput) -> list[object]:
    logprobs = [np.asarray(o["logprobs"]).tobytes() for o in output.loss_fn_outputs]
    return [sorted(output.metrics.items()), *logprobs]


def delete_models(cluster: RunningCluster, clients: Sequence[tinsmith.TrainingClient]) -> None:
    with connect(cluster.address) as stubs:
        for client in clients:
            stubs.training.DeleteModel(pb.DeleteModelRequest(model_id=client.model_id))


# --- the Training server --------------------------------------------------------------------------


def test_a_training_server_killed_with_100_waiting_calls_answers_all_of_them(
    kept: RunningCluster,
) -> None:
    """Twenty users with five calls each: each is answered, and each call counts once (row 6)."""
    services = [tinsmith.ServiceClient(base_url=kept.address) for _ in range(20)]
    made = [s.create_lora_training_client(kept.base_model, rank=2, seed=1) for s in services]
    clients = [future.result(60) for future in made]
    waiting = [
        [
            client.forward_backward(data(0), "cross_entropy"),
            client.optim_step(ADAM),
            client.forward_backward(data(1), "cross_entropy"),
            client.optim_step(ADAM),
            client.forward(data(2), "cross_entropy"),
        ]
        for client in clients
    ]
    kill(kept, "training")
    answers = [[future.result(100) for future in futures] for futures in waiting]
    # All have the same seed and the same data, so all must see the same.
    for first, step, second, again, last in answers:
        assert values(first) == values(answers[0][0])
        assert values(second) == values(answers[0][2])
        assert values(last) == values(answers[0][4])
        assert (step.metrics["step:last"], again.metrics["step:last"]) == (1, 2)
    delete_models(kept, clients)


def test_a_deadline_that_is_shorter_than_the_computing_counts_the_call_once(
    kept: RunningCluster,
) -> None:
    """DEADLINE_EXCEEDED; where the model is can be asked; a repeat is no second call (row 19)."""
    with connect(kept.address) as stubs:
        lora = pb.CreateModelRequest(lora_config=pb.LoraConfig(rank=2, seed=1))
        model_id = stubs.training.CreateModel(lora, timeout=60).model.model_id
        many = [make_datum([first, *range(1, 200)]) for first in range(8)]
        compute = pb.ForwardBackwardRequest(model_id=model_id, seq_id=1, loss_fn=LOSSES, data=many)
        step = pb.OptimStepRequest(model_id=model_id, seq_id=2)
        with hung(*kept.rank_pids()):  # No machine is so fast that it answers in time.
            with pytest.raises(grpc.RpcError) as late:
                list(stubs.training.ForwardBackward(iter([compute]), timeout=0.05))
            assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            with pytest.raises(grpc.RpcError) as late:
                stubs.training.OptimStep(step, timeout=0.01)
            assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        found = stubs.training.GetModel(pb.GetModelRequest(model_id=model_id)).model
        assert found.next_seq_id in (1, 2, 3)
        for _ in range(2):
            answers = list(stubs.training.ForwardBackward(iter([compute]), timeout=60))
            assert sum(len(answer.outputs) for answer in answers) == len(many)
            assert stubs.training.OptimStep(step, timeout=60).metrics["step:last"] == 1
        after = pb.OptimStepRequest(model_id=model_id, seq_id=3)
        metrics = stubs.training.OptimStep(after, timeout=60).metrics
        assert metrics["step:last"] == 2
        assert metrics["grad_norm:last"] == 0  # the gradients were added once and used once
        stubs.training.DeleteModel(pb.DeleteModelRequest(model_id=model_id))


OTHER_CALLS = 1
"""Creating the model."""
UPLOADS = 6
"""Before each step."""


async def test_connections_that_end_by_age_during_uploads_lose_nothing(
    kept: RunningCluster,
) -> None:
    """A proxy that sends GOAWAY every second and lets nothing finish: each call counts once
    (row 18)."""
    options = [
        ("grpc.max_connection_age_ms", 1000),
        ("grpc.max_connection_age_grace_ms", 50),
    ]
    async with ChaosProxy(kept.address, 1, share=0.0, options=options) as proxy:
        service = tinsmith.ServiceClient(base_url=proxy.address)
        client = await service.create_lora_training_client_async(kept.base_model, rank=2, seed=1)
        # About 2 MB each, and several at once, so that there is always one which an end can meet.
        long = [tinsmith.Datum(types.ModelInput.from_ints([1] * 256), _wide(256))] * 16
        began_s, steps, again = time.monotonic(), [], 0
        while again < 3 and time.monotonic() - began_s < 60:
            for _ in range(UPLOADS):
                client.forward_backward(long, "cross_entropy")
            steps.append(client.optim_step(ADAM))
            await steps[-1]
            again = sum(proxy.done.values()) - OTHER_CALLS - (UPLOADS + 1) * len(steps)
        metrics = [(await step).metrics for step in steps]
    assert [m["step:last"] for m in metrics] == [*range(1, len(steps) + 1)]
    assert again >= 3, "nothing had to be sent again"
    delete_models(kept, [client])


def _wide(length: int) -> dict[str, np.ndarray]:
    """Many targets per position: much to send and little to compute."""
    targets = np.zeros((length, 32), np.int64)
    return {"target_tokens": targets, "weights": np.full((length, 32), 1e-3, np.float32)}


# --- the Sampler ----------------------------------------------------------------------------------


def sample_request(path: str = "", count: int = 1) -> pb.SampleRequest:
    chunk = types_pb2.ModelInputChunk(tokens=tensors.encode(np.array(PROMPT)))
    params = pb.SamplingParams(max_tokens=LONG, seed=7, stop=pb.StopCondition())
    prompt = types_pb2.ModelInput(chunks=[chunk])
    return pb.SampleRequest(
        checkpoint_path=path, prompt=prompt, sampling_params=params, num_samples=count
    )


def sequences_of(responses: Iterator[pb.SampleResponse], made: Tokens) -> Tokens:
    """Add what comes to what was made so far; returns it."""
    for response in responses:
        for delta in response.deltas:
            made.setdefault(delta.sequence_index, []).extend(tensors.decode(delta.tokens).tolist())
    return made


def tokens_of(responses: Iterator[pb.SampleResponse]) -> list[int]:
    return sequences_of(responses, {}).get(0, [])


def _read(stream: Iterator[pb.SampleResponse], tokens: list[int]) -> None:
    tokens.extend(tokens_of(stream))


def kill_in_the_middle(proxy: CuttingProxy, pid: int) -> None:
    """Let a Sampler die once something of its answers has come, however fast it makes them."""

    def kill(received: int) -> bool:
        if proxy.cuts or received < BEGUN_BYTES:
            return False
        os.kill(pid, signal.SIGKILL)
        return True

    proxy.cut_after = kill


def test_a_sampler_killed_in_the_middle_of_a_sample_makes_the_same_tokens_again(
    kept: RunningCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """UNAVAILABLE, long before the deadline; the same seed gives the same tokens, and to a user of
    the client nothing has happened (row 7)."""
    with connect(kept.address) as stubs:
        whole = sequences_of(stubs.sampler.Sample(sample_request(count=SAMPLES)), {})
    assert [len(tokens) for tokens in whole.values()] == [LONG] * SAMPLES
    with CuttingProxy(kept.addresses["sampler"]) as proxy:
        monkeypatch.setenv("TINSMITH_ADDRESS_SAMPLER", proxy.address)
        kill_in_the_middle(proxy, kept.pid("sampler"))
        with (
            connect(kept.address) as stubs,
            tinsmith.ServiceClient(base_url=kept.address) as service,
        ):
            sampler = service.create_sampling_client(base_model=kept.base_model)
            params = types.SamplingParams(max_tokens=LONG, seed=7, stop=[])
            stream = stubs.sampler.Sample(sample_request(count=SAMPLES), timeout=600)
            given: Tokens = {}
            for part in sampler.sample_stream(types.ModelInput.from_ints(PROMPT), SAMPLES, params):
                given.setdefault(part.sequence_index, []).extend(part.tokens)
            begun: Tokens = {}
            with pytest.raises(grpc.RpcError) as gone:
                sequences_of(stream, begun)
            assert proxy.cuts == 1
            assert gone.value.code() is grpc.StatusCode.UNAVAILABLE
            assert sum(map(len, begun.values())) < SAMPLES * LONG
            again = sample_request(count=SAMPLES)
            made_again = sequences_of(stubs.sampler.Sample(again, wait_for_ready=True), {})
    assert made_again == given == whole


def test_weights_that_are_swapped_while_a_sequence_is_made_do_not_get_into_it(
    kept: RunningCluster,
) -> None:
    """A name is overwritten while sequences from it are being made, and other adapters come and go:
    each sequence is of one version to its end, and the next one is of the new version (row 38)."""
    service = tinsmith.ServiceClient(base_url=kept.address)
    client = service.create_lora_training_client(kept.base_model, rank=4, seed=1).result(60)

    def save(name: str) -> str:
        client.forward_backward(data(), "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=0.3))
        return client.save_weights_for_sampler(name, overwrite=True).result(60).path

    with connect(kept.address) as stubs:
        until_health(kept.addresses["sampler"], serving=True, service=SERVICES["sampler"])
        path = save("swapped")
        wanted = [tokens_of(stubs.sampler.Sample(sample_request(path)))]
        for version in range(2):
            streams = [stubs.sampler.Sample(sample_request(path)) for _ in range(2)]
            begun = [tokens_of(itertools.islice(stream, 1)) for stream in streams]
            save("swapped")
            others = [save(f"other-{version}-{number}") for number in range(2)]
            found: list[list[int]] = [[] for _ in streams]
            readers = [
                threading.Thread(target=_read, args=(stream, tokens))
                for stream, tokens in zip(streams, found, strict=True)
            ]
            for reader in readers:
                reader.start()
            for other in others:
                tokens_of(stubs.sampler.Sample(sample_request(other)))
            for reader in readers:
                reader.join(120)
            for first, rest in zip(begun, found, strict=True):
                assert first + rest == wanted[-1]
            wanted.append(tokens_of(stubs.sampler.Sample(sample_request(path))))
    assert len({tuple(tokens) for tokens in wanted}) == len(wanted)
    delete_models(kept, [client])
