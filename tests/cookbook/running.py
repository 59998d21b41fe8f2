"""Runs one recipe, in a folder of its own, and checks what it leaves."""

import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cookbook.recipes import RECIPES, Recipe, read_metrics

CLIENT_FOLDER = Path(__file__).parents[2] / "client"
PREFIXES: Mapping[str, Sequence[str]] = {"tinsmith": ("-m", "tinsmith.tinker"), "sdk": ()}
"""What stands between the interpreter and the program."""


@dataclass(frozen=True)
class Runner:
    """How recipes are run.

    Attributes:
        folder: Where the model and the data are; each recipe has a folder of its own below.
        variables: Where the cluster or its gateway is, as variables of the program's environment.
        python: Interpreter that has, or finds beside the cookbook, what the cookbook needs.
        cookbook: Folder with the package `tinker_cookbook`.
        client: A key of `PREFIXES`.
        sdk: Folder with the package `tinker`, for that client.
        sources: Folder of the cookbook's sources, with its tests; None where there is none.
        recipe_s_max: Longest time of a recipe.
    """

    folder: Path
    variables: Mapping[str, str]
    python: Path
    cookbook: Path
    client: str = "tinsmith"
    sdk: Path | None = None
    sources: Path | None = None
    recipe_s_max: float = 900.0

    def run(self, name: str) -> str:
        """Run a recipe; returns what was found.

        Raises:
            AssertionError: It failed, or what it left is not what must come of it.
            subprocess.TimeoutExpired: It did not end in time.
        """
        recipe = RECIPES[name]
        if recipe.run[0].startswith("tests/") and self.sources is None:
            return "left out: only the sources of the cookbook have it"
        place = self._place(name)
        output, metrics = place / "output.txt", place / recipe.metrics
        ends_s = time.monotonic() + self.recipe_s_max
        with output.open("wb") as log:
            files = {"stdout": log, "stderr": log}
            start = partial(
                subprocess.Popen,
                self._command(recipe),
                cwd=place,
                env=self._environment(place),
                **files,
            )
            if recipe.killed_after:
                with start() as first:
                    while len(read_metrics(metrics)) < recipe.killed_after:
                        assert first.poll() is None, f"ended with {first.returncode}; see {output}"
                        assert time.monotonic() < ends_s, "made no step in time"
                        time.sleep(0.05)
                    first.kill()
            with start() as process:
                try:
                    code = process.wait(max(ends_s - time.monotonic(), 1))
                except subprocess.TimeoutExpired:
                    process.kill()
                    raise
        said = output.read_text(errors="replace")
        assert not code, f"ended with {code}; {output} ends with\n{said[-1500:]}"
        return recipe.check(read_metrics(metrics), said)

    def _place(self, name: str) -> Path:
        place = self.folder / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for entry in self.folder.iterdir():  # names of models and data are relative to a recipe's
            if entry.is_dir() and entry.name not in RECIPES:
                (place / entry.name).symlink_to(entry, target_is_directory=True)
        return place

    def _command(self, recipe: Recipe) -> Sequence[str]:
        program = ["-m", f"tinker_cookbook.recipes.{recipe.run[0]}"]
        if self.sources is not None and recipe.run[0].startswith("tests/"):
            program = [str(self.sources.resolve() / recipe.run[0])]
        return [str(self.python.absolute()), *PREFIXES[self.client], *program, *recipe.run[1:]]

    def _environment(self, place: Path) -> Mapping[str, str]:
        """Offline, with everything that a recipe leaves below its own folder."""
        paths = [self.cookbook, self.sdk or CLIENT_FOLDER]
        return {
            **{name: value for name, value in os.environ.items() if name != "TINSMITH_ADDRESS"},
            "HF_DATASETS_OFFLINE": "1",
            "HF_HUB_OFFLINE": "1",
            "HOME": str(place),
            "PYTHONPATH": os.pathsep.join(str(path.resolve()) for path in paths),
            "TINKER_API_KEY": os.environ.get("TINKER_API_KEY", "tml-local"),
            "TINKER_COOKBOOK_RUNS_DIR": str(place / "runs"),
            **self.variables,
        }
