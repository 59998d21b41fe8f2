"""Fixtures of tests without a cluster."""

from collections.abc import Iterator

import pytest

from faults.peer import Peer
from tinsmith import _retry


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    """A server that answers at once, and whose client does not wait long between attempts."""
    monkeypatch.setattr(_retry, "DELAY_S_FIRST", 0.01)
    running = Peer()
    running.servicer.sample_breaks = 0
    yield running
    running.stop()
