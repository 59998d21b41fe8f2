"""Processes die while checkpoints are saved, at each failpoint of ranks, Training and Checkpoint
server: one after the other in the same place. What is visible is whole and right.

`make test` has one crash at two of them; `make faults` ten at each.
"""

import random
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import tinsmith
from clusters import RunningCluster
from faults.amount import FULL, amount
from faults.harness import victims_of
from faults.script import make_data
from faults.users import delete_models, read_files
from faults.victims import (
    CHECKPOINT_POINTS,
    RANK_POINTS,
    TRAINING_POINTS,
    Victims,
    alive,
    kind_of,
    wait_until,
)
from tinsmith import types
from tinsmith import v1 as pb

CRASHES = amount(1, full=10)
ROUNDS_MAX = 3 * CRASHES
POINTS = tuple(
    point
    for point in (*TRAINING_POINTS, *RANK_POINTS, *CHECKPOINT_POINTS)
    if point != "ckpt_mid_write"  # here states are left and not sent
)
ALWAYS = ("wal_fsync", "mid_deposit", "ckpt_mid_take", "ckpt_pre_rename")
ROUND_S_MAX = 400.0
"""One call may meet all crashes, and the ranks start anew each time."""
ROLLING = "weights/rolling"
LATEST: Mapping[str, int] = {
    **dict.fromkeys(("recv", "enqueue", "pre_result", "post_result_pre_ack"), 9),
    **dict.fromkeys(("wal_append", "wal_fsync"), 6),
    **dict.fromkeys(("mid_backward", "mid_deposit", "ckpt_mid_take"), 4),
    **dict.fromkeys(("pre_optim", "mid_optim", "post_optim_pre_ack"), 3),
    **dict.fromkeys(
        ("ckpt_pre_fsync", "ckpt_pre_rename", "ckpt_mid_rename", "ckpt_post_rename"), 3
    ),
    "ckpt_post_commit": 3,
}
"""A failpoint acts when it is reached for the n-th time, n from 1 to this or 1: a round has ten
calls, three of them steps and three of them saves."""
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def running(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RunningCluster, Victims]]:
    """Calls have parts to be killed between, and every other step is followed by a snapshot."""
    settings = {
        "TINSMITH_TRAINING_SNAPSHOT_STEPS": "2",
        "TINSMITH_TRAINER_MICRO_BATCH_TOKENS_MAX": "24",
    }
    with victims_of(tiny_model, tmp_path_factory.mktemp("saving"), **settings) as found:
        yield found


def create(cluster: RunningCluster) -> tinsmith.TrainingClient:
    """A model with gradients that have to be made again by whoever is started anew."""
    service = tinsmith.ServiceClient(base_url=cluster.address)
    client = service.create_lora_training_client(cluster.base_model, rank=2, seed=1).result(100)
    data = make_data(np.random.default_rng(0), 3, 12)
    client.forward_backward(data, "cross_entropy").result(100)
    return client


def train_and_save(client: tinsmith.TrainingClient, number: int) -> None:
    """Ten calls, all sent at once: saves between all others, one under a name that is used again
    and again, and two under new ones."""
    rng = np.random.default_rng(number)
    adam = types.AdamParams(learning_rate=1e-2 / number)

    def add() -> Any:
        return client.forward_backward(make_data(rng, 3, 12), "cross_entropy")

    futures: list[Any] = [
        add(),
        client.optim_step(adam),
        client.save_state("rolling", overwrite=True),
        add(),
        client.optim_step(adam),
        client.save_state(f"round-{number}"),
        add(),
        client.forward(make_data(rng, 3, 12), "cross_entropy"),
        client.optim_step(adam),
        client.save_weights_for_sampler(f"round-{number}"),
    ]
    for future in futures:
        future.result(ROUND_S_MAX)


class Published:
    """The checkpoints of one model as anybody can see them."""

    def __init__(self, cluster: RunningCluster, client: tinsmith.TrainingClient) -> None:
        self._address = cluster.addresses["checkpoint"]
        self._model_id = client.model_id

    def names(self) -> list[str]:
        """What is listed, such as `weights/rolling`."""
        with grpc.insecure_channel(self._address) as channel:
            stub = pb.CheckpointServiceStub(channel)
            request = pb.ListCheckpointsRequest(model_id=self._model_id, page_size=1000)
            found = stub.ListCheckpoints(request, wait_for_ready=True, timeout=60).checkpoints
        return [checkpoint.checkpoint_path.split("/", 3)[3] for checkpoint in found]

    def read(self, name: str) -> Files:
        """The files of one, which the server checks while it reads."""
        return read_files(self._address, f"tinsmith://{self._model_id}/{name}")


@pytest.fixture(scope="module")
def rounds(running: tuple[RunningCluster, Victims]) -> list[dict[str, Files]]:
    """What is published after each round when nobody dies."""
    client = create(running[0])
    published = Published(running[0], client)
    found: list[dict[str, Files]] = [{}]
    for number in range(1, ROUNDS_MAX + 1):
        train_and_save(client, number)
        new = (ROLLING, f"weights/round-{number}", f"sampler_weights/round-{number}")
        found.append({**found[-1], **{name: published.read(name) for name in new}})
    assert set(found[-1]) == set(published.names())
    delete_models(running[0].address)
    return found


class Chain:
    """Gives a failpoint to each process that is started in the place of one that died of it."""

    def __init__(self, victims: Victims, point: str) -> None:
        self._victims = victims
        self._point = point
        self._rng = random.Random(point)
        self._claimed: list[int] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._go_on, daemon=True)

    @property
    def crashes(self) -> int:
        """How many died of it."""
        return sum(not alive(pid) for pid in self._claimed)

    def _arm(self) -> None:
        self._victims.arm(self._point, self._rng.randint(1, LATEST.get(self._point, 1)))

    def _go_on(self) -> None:
        while not self._done.wait(0.01):
            pid = self._victims.armed_pid(kind_of(self._point))
            if pid is not None and pid not in self._claimed:
                self._claimed.append(pid)
                if len(self._claimed) < CRASHES:
                    self._arm()

    def __enter__(self) -> "Chain":
        self._arm()
        self._victims.kill_process(kind_of(self._point))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._victims.disarm()


class Reader:
    """Somebody else, who reads what is published all the while."""

    def __init__(self, published: Published, rounds: list[dict[str, Files]]) -> None:
        self.count = 0
        """Checkpoints that were read whole."""
        self.wrong: list[str] = []
        self._published = published
        self._rolling = [files[ROLLING] for files in rounds[1:]]
        self._expected = rounds[-1]
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def _read(self) -> None:
        rng = random.Random(0)
        while not self._done.wait(0.02):
            try:
                names = self._published.names()
                if not names:
                    continue
                name = ROLLING if rng.random() < 0.5 and ROLLING in names else rng.choice(names)
                files = self._published.read(name)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    self.wrong.append(str(error))
                continue
            self.count += 1
            good = self._rolling if name == ROLLING else [self._expected[name]]
            if files not in good:
                self.wrong.append(f"{name} is not what it should be")

    def __enter__(self) -> "Reader":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("point", POINTS if FULL else ALWAYS)
def test_what_is_published_is_whole_whoever_dies_while_it_is_saved(
    running: tuple[RunningCluster, Victims], rounds: list[dict[str, Files]], point: str
) -> None:
    """Rows 3 to 8: after each round exactly the checkpoints of an undisturbed run are published,
    with the same bytes; meanwhile nobody reads a part of one, or one that is none of them."""
    cluster, victims = running
    client = create(cluster)
    published = Published(cluster, client)
    number = 0
    with Reader(published, rounds) as reader, Chain(victims, point) as chain:
        while chain.crashes < CRASHES:
            number += 1
            assert number < len(rounds), f"{chain.crashes} crashes in {number - 1} rounds"
            train_and_save(client, number)
            found = {name: published.read(name) for name in published.names()}
            assert found == rounds[number]
        wait_until(lambda: reader.count > 0 or bool(reader.wrong))
    assert reader.wrong == []
    assert reader.count > 0
    delete_models(cluster.address)
    print(f"{point}: {chain.crashes} crashes, {number} rounds, {reader.count} checkpoints read")


def test_only_the_same_call_is_a_repeat(running: tuple[RunningCluster, Victims]) -> None:
    """Training dies between save and record: the call that is made again succeeds, once, and a
    save of the same weights under the same name by another call is refused."""
    cluster, victims = running
    client = create(cluster)
    published = Published(cluster, client)
    victims.arm("pre_result", 1)
    victims.kill_process("training")
    path = client.save_state("best", ttl_seconds=3600).result(ROUND_S_MAX).path
    assert not alive(victims.armed_pid("training"))
    rest = tinsmith.ServiceClient(base_url=cluster.address).create_rest_client()

    def found() -> pb.Checkpoint:
        with grpc.insecure_channel(cluster.addresses["checkpoint"]) as channel:
            stub = pb.CheckpointServiceStub(channel)
            return stub.GetCheckpoint(
                pb.GetCheckpointRequest(checkpoint_path=path), timeout=60
            ).checkpoint

    first = found()
    for ttl_seconds in (None, 3600):
        with pytest.raises(tinsmith.AlreadyExistsError) as refusal:
            client.save_state("best", ttl_seconds=ttl_seconds).result(100)
        assert refusal.value.reason == "CHECKPOINT_EXISTS"
    assert found() == first
    assert first.HasField("expire_time")
    assert published.names() == ["weights/best"]
    rest.copy_weights(path, destination_path=f"{path}-copy", ttl_seconds=60).result(100)
    with pytest.raises(tinsmith.AlreadyExistsError):
        rest.copy_weights(path, destination_path=f"{path}-copy").result(100)
    again = client.save_state("best", overwrite=True).result(100)
    assert again.path == path
    assert not found().HasField("expire_time")
    delete_models(cluster.address)
