"""Fixtures of tests that ask one service."""

import pytest

import tinsmith
from clusters import RunningCluster


@pytest.fixture
def service(cluster: RunningCluster) -> tinsmith.ServiceClient:
    """A way into the shared cluster."""
    return tinsmith.ServiceClient(base_url=cluster.address)
