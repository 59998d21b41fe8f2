"""Fixtures of tests that ask one service."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

import tinsmith
from checkpoint_server import Served
from clusters import RunningCluster
from tinsmith import v1 as pb
from tinsmith.cluster import Cluster


@pytest.fixture
def service(cluster: RunningCluster) -> tinsmith.ServiceClient:
    """A way into the shared cluster."""
    return tinsmith.ServiceClient(base_url=cluster.address)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    """A Checkpoint server on a free port with an empty folder."""
    async with Served.running(tmp_path) as served:
        yield served


@pytest.fixture
def model(stubs: Cluster) -> Iterator[pb.Model]:
    """A fresh model, deleted afterwards."""
    lora = pb.LoraConfig(rank=2, seed=1)
    created = stubs.training.CreateModel(pb.CreateModelRequest(lora_config=lora)).model
    yield created
    stubs.training.DeleteModel(pb.DeleteModelRequest(model_id=created.model_id))
