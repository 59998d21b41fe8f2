"""A Checkpoint server that hangs, or is slow, delays the calls that need it and nobody else's."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import tinsmith
from clusters import until_health
from faults.processes import Process, Training, hung
from faults.slow_way import SlowWay
from faults.users import read_files
from tinsmith import types
from tinsmith import v1 as pb
from tinsmith.v1 import types_pb2
from tinsmithd.up import SERVICES
from tiny_models import write_tiny_model
from wire import reason_and_field

ADAM = types.AdamParams(learning_rate=1e-2)
PROMPT = types.ModelInput.from_ints([1, 2, 3])
PARAMS = types.SamplingParams(max_tokens=4, seed=1)
STALL_S = 6.0
"""A machine that stands still for a moment is not yet a server that hangs."""
VOCAB_SIZE = 8192
RANK = 256
"""With that vocabulary its state of 30 MB does not fit into the buffers on the way."""
SLOW_BYTES_PER_S = 1_200_000
"""At this rate it takes twice as long as `STALL_S`."""


class World:
    """A Checkpoint server, a Training server with a rank, and a Sampler of one request at a time;
    both reach the first through ways that can be made slow."""

    def __init__(self, base_model: Path, folder: Path, stack: ExitStack) -> None:
        settings = {"data_folder": folder / "checkpoints"}
        self.checkpoint = stack.enter_context(Process("checkpoint", folder, settings))
        self.way = stack.enter_context(SlowWay(self.checkpoint.port))
        self.samplers_way = stack.enter_context(SlowWay(self.checkpoint.port))
        patience = {"checkpoint_stall_s_max": STALL_S, "checkpoint_answer_s_max": STALL_S}
        every = {"base_model": base_model, "threads": 1, "running_max": 1, "adapters_max": 2}
        every["ahead_bytes_max"] = 0  # nothing is there before somebody asks for it
        target = {"checkpoint_target": self.samplers_way.address}
        self.sampler = stack.enter_context(
            Process("sampler", folder, {**every, **target, **patience})
        )
        self.training = stack.enter_context(
            Training(
                base_model,
                folder,
                checkpoint_target=self.way.address,
                checkpoint_address=f":{self.checkpoint.port}",
                sampler_address=f":{self.sampler.port}",
                **patience,
            )
        )
        self.training.start_rank()
        until_health(self.training.address, serving=True)
        address = f"127.0.0.1:{self.sampler.port}"
        until_health(address, serving=True, service=SERVICES["sampler"])
        self.service = stack.enter_context(tinsmith.ServiceClient(base_url=self.training.address))
        self.name = base_model.name

    def model(self, seed: int, rank: int = 2) -> tinsmith.TrainingClient:
        """A model that has made a step."""
        client = self.service.create_lora_training_client(self.name, rank, seed).result(60)
        step(client)
        return client

    def read(self, path: str) -> dict[str, bytes]:
        """The files of a checkpoint."""
        return read_files(f"127.0.0.1:{self.checkpoint.port}", path)

    def hung(self) -> AbstractContextManager[None]:
        """The Checkpoint server does nothing meanwhile."""
        return hung(self.checkpoint.pid)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("hung")
    base_model = write_tiny_model(folder / "tiny-wide", vocab_size=VOCAB_SIZE)
    with ExitStack() as stack:
        yield World(base_model, folder, stack)


@pytest.fixture(scope="module")
def saver(world: World) -> tinsmith.TrainingClient:
    return world.model(1, RANK)


@pytest.fixture(scope="module")
def other(world: World) -> tinsmith.TrainingClient:
    return world.model(2)


def step(client: tinsmith.TrainingClient) -> float:
    """Two calls, answered."""
    data = types.Datum(
        types.ModelInput.from_ints([1, 2, 3]),
        {"target_tokens": np.array([2, 3, 4]), "weights": np.ones(3, np.float32)},
    )
    added = client.forward_backward([data], "cross_entropy")
    stepped = client.optim_step(ADAM)
    stepped.result(40)
    return added.result(40).metrics["loss:sum"]


def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def under_way(way: SlowWay, start: Callable[[], Any], nbytes: int = 1) -> Any:
    """Start something, and wait until so much of it has come to the way."""
    before = way.sent
    started = start()
    until(lambda: way.sent >= before + nbytes)
    return started


def test_a_hung_checkpoint_server_delays_the_save_and_nobody_else(
    world: World, saver: tinsmith.TrainingClient, other: tinsmith.TrainingClient
) -> None:
    """Others train, come and have snapshots taken; then the save ends well, with the same bytes."""
    calm = saver.save_state("calm").result(60).path
    with world.hung():
        saving = under_way(
            world.way, lambda: saver.save_state("hung"), 20_000
        )  # more than a header
        for _ in range(4):
            step(other)
        world.model(3)
        assert not saving.future().done()
    assert world.read(saving.result(60).path) == world.read(calm)
    step(saver)


def test_a_hung_checkpoint_server_delays_loads_and_nobody_else(
    world: World, saver: tinsmith.TrainingClient, other: tinsmith.TrainingClient
) -> None:
    """Into a model and into a new one; both end well."""
    path = saver.save_state("to-load").result(60).path
    with world.hung():
        loading = under_way(world.way, lambda: saver.load_state_with_optimizer(path))
        create = world.service.create_training_client_from_state_with_optimizer
        creating = under_way(world.way, lambda: create(path))
        step(other)
        world.model(4)
        assert not loading.future().done()
        assert not creating.future().done()
    loading.result(60)
    for client in (saver, creating.result(60)):
        again = client.save_state("loaded").result(60).path
        assert world.read(again) == world.read(path)


def test_a_save_that_a_restart_interrupts_while_it_hangs_is_made_again(
    world: World, saver: tinsmith.TrainingClient, other: tinsmith.TrainingClient
) -> None:
    """At its place in the order: calls after it come after it."""
    calm = saver.save_state("before").result(60).path
    with world.hung():
        saving = under_way(world.way, lambda: saver.save_state("restarted"), 20_000)
        later = saver.optim_step(ADAM)
        world.training.restart_server()
        step(other)
        assert not saving.future().done()
    assert world.read(saving.result(60).path) == world.read(calm)
    later.result(60)


def test_every_call_to_a_hung_server_ends(world: World, saver: tinsmith.TrainingClient) -> None:
    """UNAVAILABLE once nothing moves for `checkpoint_stall_s_max`; the same call works later."""
    with grpc.insecure_channel(world.training.address) as channel:
        stub = pb.TrainingServiceStub(channel)
        kinds = {"kind": types_pb2.CHECKPOINT_KIND_TRAINING, "name": "given-up"}
        save = pb.SaveCheckpointRequest(model_id=saver.model_id, **kinds)
        path = saver.save_state("there").result(60).path
        load = pb.LoadCheckpointRequest(model_id=saver.model_id, checkpoint_path=path)
        create = pb.CreateModelRequest(checkpoint_path=path)
        calls = (
            (stub.SaveCheckpoint, save),
            (stub.LoadCheckpoint, load),
            (stub.CreateModel, create),
        )
        with world.hung():
            for call, request in calls:
                with pytest.raises(grpc.RpcError) as given_up:
                    call(request, timeout=60)
                assert given_up.value.code() is grpc.StatusCode.UNAVAILABLE
                assert reason_and_field(given_up.value)[0] == "CHECKPOINT_UNAVAILABLE"
        for call, request in calls:
            call(request, timeout=60)


def test_a_slow_server_that_makes_progress_is_waited_for(
    world: World, saver: tinsmith.TrainingClient, other: tinsmith.TrainingClient
) -> None:
    """Longer than `checkpoint_stall_s_max`, both ways; others go on."""
    calm = saver.save_state("fast").result(60).path
    with grpc.insecure_channel(world.training.address) as channel:
        stub = pb.TrainingServiceStub(channel)
        kinds = {"kind": types_pb2.CHECKPOINT_KIND_TRAINING, "name": "slow"}
        save = pb.SaveCheckpointRequest(model_id=saver.model_id, **kinds)
        create = pb.CreateModelRequest(checkpoint_path=calm)
        world.way.bytes_per_s = SLOW_BYTES_PER_S
        try:
            begun_s = time.monotonic()
            saving = stub.SaveCheckpoint.future(save, timeout=100)  # type: ignore[attr-defined]
            creating = stub.CreateModel.future(create, timeout=100)  # type: ignore[attr-defined]
            step(other)
            assert not saving.done()
            assert not creating.done()
            path = saving.result().checkpoint_path
            creating.result()
            assert time.monotonic() - begun_s > STALL_S
        finally:
            world.way.bytes_per_s = 0
    assert world.read(path) == world.read(calm)


def test_a_hung_checkpoint_server_delays_only_samples_that_need_it(
    world: World, saver: tinsmith.TrainingClient
) -> None:
    """The base model and adapters in memory are sampled; one that has to be fetched waits."""
    opened = []
    for name in ("one", "two"):
        path = saver.save_weights_for_sampler(name).result(60).path
        opened.append(world.service.create_sampling_client(path).result(60))
    base = world.service.create_sampling_client(base_model=world.name).result(60)
    here, absent = opened
    first = tokens(here.sample(PROMPT, 1, PARAMS).result(60))
    with world.hung():
        waiting = under_way(world.samplers_way, lambda: absent.sample(PROMPT, 1, PARAMS))
        assert tokens(here.sample(PROMPT, 1, PARAMS).result(60)) == first
        base.sample(PROMPT, 1, PARAMS).result(60)
        assert not waiting.future().done()
    waiting.result(60)


def tokens(response: types.SampleResponse) -> list[int]:
    return list(response.sequences[0].tokens)
