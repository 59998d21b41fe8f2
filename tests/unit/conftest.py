"""Fixtures of tests without a cluster."""

import functools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

import tinsmith
from faults.peer import Peer
from replicas import Replicas
from sampler_recorder import Recorder, new_admission
from tinsmith import _retry
from tinsmithd.sampler.admission import Admission

# The same texts and shapes each time, however long the machine stands still in between.
hypothesis.settings.register_profile(
    "unit",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("unit")


@pytest.fixture(autouse=True)
def _clients_end_with_their_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a client still waits for is not said while the next test reads what clients say."""
    made: list[tinsmith.ServiceClient] = []
    initialize = tinsmith.ServiceClient.__init__

    @functools.wraps(initialize)
    def remembering(self: tinsmith.ServiceClient, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(tinsmith.ServiceClient, "__init__", remembering)
    yield
    for client in made:
        client.close().result(10)


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    """A server that answers at once, and whose client does not wait long between attempts."""
    monkeypatch.setattr(_retry, "DELAY_S_FIRST", 0.01)
    monkeypatch.setattr(_retry, "DELAY_S_MAX", 0.05)
    running = Peer()
    running.servicer.sample_breaks = 0
    yield running
    running.stop()


@pytest.fixture
async def engine() -> Recorder:
    """What a Sampler's admission has below it, fresh."""
    return Recorder()


@pytest.fixture
async def admission(engine: Recorder) -> AsyncIterator[Admission]:
    """A Sampler's: two run, one waits, two adapters."""
    admission = new_admission(engine, 2, 1, 2)
    yield admission
    await admission.close()


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[Replicas]:
    """Keepers over one object store that has nothing yet."""
    found = Replicas(tmp_path)
    yield found
    for name in list(found.opened):
        found.close(name)
