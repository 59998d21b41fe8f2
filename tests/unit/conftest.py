"""Fixtures of tests without a cluster."""

from collections.abc import AsyncIterator, Iterator

import pytest

from faults.peer import Peer
from sampler_recorder import Recorder, new_admission
from tinsmith import _retry
from tinsmithd.sampler.admission import Admission


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
