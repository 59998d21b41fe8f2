"""Fixtures of tests in which something fails."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import tinsmith
from faults.processes import Training
from faults.recovering import STEPS, Seen, model_of, train


@pytest.fixture(scope="session")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What two times `STEPS` steps give when nothing fails."""
    with Training(tiny_model, tmp_path_factory.mktemp("twin")) as training:
        training.start_rank()
        return train(model_of(tinsmith.ServiceClient(base_url=training.address)), 0, 2 * STEPS)


@pytest.fixture
def training(tiny_model: Path, tmp_path: Path) -> Iterator[Training]:
    """A Training server without ranks, whose groups lose their place after 5 s of silence."""
    with Training(tiny_model, tmp_path, rank_lease_s=5) as running:
        yield running
