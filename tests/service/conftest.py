"""Fixtures of tests that ask one service."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

import tinsmith
from certificates import Issued
from checkpoint_server import Served
from clusters import RunningCluster
from keyed import Keyed, keyed_cluster
from tinsmith import v1 as pb
from tinsmith.cluster import Cluster
from tinsmithd.tls import certificates
from watched import Watched, watched_cluster


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
def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate that is replaced is seen by the next handshake, not within a second."""
    monkeypatch.setattr(certificates, "LOOK_INTERVAL_S", 0.0)


@pytest.fixture
def shown(tmp_path: Path) -> Issued:
    """What servers show to callers."""
    return Issued(tmp_path / "shown")


@pytest.fixture
def model(stubs: Cluster) -> Iterator[pb.Model]:
    """A fresh model, deleted afterwards."""
    lora = pb.LoraConfig(rank=2, seed=1)
    created = stubs.training.CreateModel(pb.CreateModelRequest(lora_config=lora)).model
    yield created
    stubs.training.DeleteModel(pb.DeleteModelRequest(model_id=created.model_id))


@pytest.fixture(scope="package")
def keyed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    """A cluster with keys, and callers of several tenants."""
    with keyed_cluster(tiny_model, tmp_path_factory.mktemp("keyed")) as made:
        yield made


@pytest.fixture(scope="package")
def watched(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A cluster with keys that says all that it can: logs at DEBUG, metrics and spans."""
    with watched_cluster(tiny_model, tmp_path_factory.mktemp("watched")) as made:
        yield made
