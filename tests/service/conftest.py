"""Fixtures of tests that ask one service."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

import tinsmith
from checkpoint_server import Served
from checkpoints import Clock
from clusters import RunningCluster
from tinsmith import v1 as pb
from tinsmith.cluster import Cluster
from tinsmithd.checkpoint.server import CheckpointServer
from tinsmithd.config import CheckpointConfig


@pytest.fixture
def service(cluster: RunningCluster) -> tinsmith.ServiceClient:
    """A way into the shared cluster."""
    return tinsmith.ServiceClient(base_url=cluster.address)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    """A Checkpoint server on a free port with an empty folder."""
    clock, monotonic = Clock(), Clock()
    config = CheckpointConfig(
        listen_address="127.0.0.1:0", data_folder=str(tmp_path), stop_grace_s=1
    )
    server = CheckpointServer(config, clock, monotonic)
    await server.start()
    running = Served(tmp_path, clock, monotonic, server)
    yield running
    await running.channel.close()
    await server.stop()


@pytest.fixture
def model(stubs: Cluster) -> Iterator[pb.Model]:
    """A fresh model, deleted afterwards."""
    lora = pb.LoraConfig(rank=2, seed=1)
    created = stubs.training.CreateModel(pb.CreateModelRequest(lora_config=lora)).model
    yield created
    stubs.training.DeleteModel(pb.DeleteModelRequest(model_id=created.model_id))
