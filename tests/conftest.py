"""Fixtures that every layer shares."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Two cores, many processes: one thread each is fastest and keeps numbers repeatable.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["TINSMITH_CACHE"] = os.environ.get("TINSMITH_CACHE", "build/test-cache")

import programs
from clusters import RunningCluster
from gateways import RunningGateway, running_gateway
from tinsmith.cluster import Cluster, connect
from tiny_models import write_tiny_model

programs.sharing = True
ROOT = Path(__file__).parent.parent


def pytest_collection_finish() -> None:
    """Let Python's collector pass over what was imported, hundreds of thousands of objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama with a byte-level tokenizer."""
    return write_tiny_model(tmp_path_factory.mktemp("base") / "tiny-llama")


@pytest.fixture(scope="session")
def cluster(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """One cluster on a tiny model, shared by the session: tests make models of their own."""
    with RunningCluster(tiny_model, tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture(scope="session")
def gateway(
    cluster: RunningCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningGateway]:
    """A gateway in front of `cluster`, shared by the session."""
    with running_gateway(cluster.address, tmp_path_factory.mktemp("gateway")) as running:
        yield running


@pytest.fixture(scope="session")
def stubs(cluster: RunningCluster) -> Iterator[Cluster]:
    """Generated stubs connected to `cluster`."""
    with connect(cluster.address) as connected:
        yield connected


@pytest.fixture(scope="session")
def real_model() -> Path:
    """Folder of SmolLM2-135M-Instruct, as `make model` leaves it."""
    default = ROOT / ".models" / "SmolLM2-135M-Instruct"
    folder = Path(os.environ.get("TINSMITH_TEST_MODEL", default))
    if not (folder / "config.json").exists():
        pytest.skip(f"no real model in {folder}: run `make model`")
    return folder


@pytest.fixture(scope="session")
def real_cluster(
    real_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningCluster]:
    """One cluster on the real SmolLM2 weights, float32."""
    with RunningCluster(real_model, tmp_path_factory.mktemp("real-cluster")) as running:
        yield running
