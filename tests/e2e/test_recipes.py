"""Recipes of tinker-cookbook as published, on this client: those that end soonest.

`make recipes` installs the cookbook and what it needs beside this environment; `make test` does,
too. `make cookbook` runs all of them.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clusters import RunningCluster
from cookbook.folder import write_folder
from cookbook.running import Runner

COOKBOOK = Path(__file__).parents[2] / "build" / "recipes"
RECIPES = ("sl_loop", "dpo", "distillation")
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """Where recipes run, beside a cluster of a tiny model under the name that they ask for."""
    if not (COOKBOOK / ".installed").exists():
        pytest.skip(f"no cookbook in {COOKBOOK}: run `make recipes`")
    folder = tmp_path_factory.mktemp("cookbook")
    with RunningCluster(write_folder(folder), tmp_path_factory.mktemp("cluster")) as cluster:
        variables = {"TINSMITH_ADDRESS": cluster.address}
        yield Runner(folder, variables, Path(sys.executable), COOKBOOK)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_as_it_is(recipe: str, runner: Runner) -> None:
    """And what it reports is right."""
    print(runner.run(recipe))
