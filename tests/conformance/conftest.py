"""Tiny models and engines on them, here and in processes of their own."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from suite import ENGINES, new_engine

import object_stores
import programs
from object_stores import SeaweedFS
from tinsmithd.trainer.engines.interface import TrainingEngine
from tiny_models import write_tiny_model


@pytest.fixture(scope="session", autouse=True)
def _all_is_imported() -> None:
    """An engine that goes lets the collector look for it: a quarter of a second with all of torch,
    which is there to stay."""
    programs.share_template()
    import tinsmithd.trainer.preload  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """A real S3."""
    with object_stores.seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as running:
        yield running


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny models by family, written once."""
    root = tmp_path_factory.mktemp("families")

    def folder(family: str) -> Path:
        path = root / family
        kind, _, tied = family.partition("-")
        return path if path.exists() else write_tiny_model(path, kind, tie=bool(tied))

    return folder


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, folders: Callable[[str], Path]) -> TrainingEngine:
    """Each engine in turn, on a tiny Llama."""
    return new_engine(request.param, folders("llama"))
