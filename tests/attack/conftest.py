"""One cluster for the attacks that need a whole one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from clusters import RunningCluster
from programs import environment


@pytest.fixture(scope="session")
def attacked(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningCluster]:
    """A cluster of its own: many of the calls will wait for numbers that never come."""
    settings = {"TINSMITH_TRAINING_GAP_WAIT_S_MAX": "2", "TINSMITH_TRAINING_MODELS_MAX": "1000"}
    folder = tmp_path_factory.mktemp("attacked")
    with environment(**settings), RunningCluster(tiny_model, folder) as running:
        yield running
