"""A laptop with `tinsmith[client]` and no torch, against a cluster."""

from pathlib import Path

import pytest

import laptops
from clusters import RunningCluster


@pytest.fixture(scope="module")
def laptop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What it has installed."""
    return laptops.site_packages(tmp_path_factory.mktemp("laptop"), "client")


def test_a_laptop_samples_without_torch(
    laptop: Path, cluster: RunningCluster, tmp_path: Path
) -> None:
    """A chat, too, whose template transformers reads; a client alone says what it lacks."""
    variables = {"TINSMITH_ADDRESS": cluster.address, "TINSMITH_CACHE": str(tmp_path)}
    line = ("sample", "--max-tokens", "4", "--temperature", "0")
    for more in ((), ("--chat",)):
        done = laptops.run(laptop, *line, *more, "Hello", variables=variables)
        assert done.returncode == 0, done.stderr
        assert "4 tokens" in done.stderr or "ended by stop" in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
    (tmp_path / "alone").mkdir()
    alone = laptops.site_packages(tmp_path / "alone")
    done = laptops.run(alone, *line, "Hello", variables=variables)
    assert done.returncode == 1
    assert "pip install 'tinsmith[client]'" in done.stderr
    assert len(done.stderr.splitlines()) == 2
    listed = laptops.run(alone, "models", "ls", "--json", variables=variables)
    assert listed.returncode == 0
