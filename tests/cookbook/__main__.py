"""python -m cookbook: runs recipes, and writes a line for each. See the package's own words."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from cookbook.folder import MODEL, write_folder
from cookbook.recipes import RECIPES, Recipe, read_metrics
from gateways import running_gateway

CLIENT_FOLDER = Path(__file__).parents[2] / "client"
PREFIXES: Mapping[str, Sequence[str]] = {"tinsmith": ("-m", "tinsmith.tinker"), "sdk": ()}
"""What stands between the interpreter and the program."""


def main() -> int:
    """Run what the command line names against the cluster of the environment; 0 when all pass."""
    parser = argparse.ArgumentParser(prog="cookbook", description=__doc__)
    parser.add_argument("--python", type=Path, help="interpreter that has the cookbook's needs")
    parser.add_argument("--cookbook", type=Path, help="folder with the package tinker_cookbook")
    parser.add_argument("--sources", type=Path, help="folder of its sources, with its tests")
    parser.add_argument("--sdk", type=Path, help="folder with the package tinker")
    parser.add_argument("--client", choices=PREFIXES, default="tinsmith")
    parser.add_argument("--folder", type=Path, required=True, help="where to work")
    parser.add_argument("--timeout", type=float, default=900, help="of a recipe, seconds")
    parser.add_argument("--write", action="store_true", help="only write the model and the data")
    parser.add_argument("names", nargs="*", metavar="RECIPE", help=", ".join(RECIPES))
    options = parser.parse_args()
    folder = options.folder.resolve()
    if options.write:
        write_folder(folder)
        return 0
    unknown = [name for name in options.names if name not in RECIPES]
    needed = (options.python, options.cookbook, options.sdk or options.client != "sdk")
    if unknown or not all(needed):
        needs = "--python and --cookbook are needed, and --sdk for that client"
        parser.error(f"no recipe {unknown[0]}" if unknown else needs)
    address = os.environ["TINSMITH_ADDRESS"]
    if options.client == "tinsmith":
        return _run_all(options, folder, {"TINSMITH_ADDRESS": address})
    names = json.dumps({MODEL: MODEL.rpartition("/")[2]})
    with running_gateway(address, folder / "gateway", base_models=names) as gateway:
        return _run_all(options, folder, {"TINKER_BASE_URL": gateway.url})


def _run_all(options: argparse.Namespace, folder: Path, variables: Mapping[str, str]) -> int:
    failed = []
    for name in options.names or RECIPES:
        began_s = time.monotonic()
        try:
            found = _run(name, RECIPES[name], folder, options, variables)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            failed.append(name)
            found = f"FAILED: {error}"
        print(f"{name:<15}{time.monotonic() - began_s:6.0f} s  {found}", flush=True)
    print(f"{len(options.names or RECIPES) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


def _run(
    name: str,
    recipe: Recipe,
    folder: Path,
    options: argparse.Namespace,
    variables: Mapping[str, str],
) -> str:
    is_script = recipe.run[0].startswith("tests/")
    if is_script and not options.sources:
        return "left out: only the sources of the cookbook have it"
    place = folder / name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for entry in folder.iterdir():  # names of models and data are relative to where a recipe runs
        if entry.is_dir() and entry.name not in RECIPES:
            (place / entry.name).symlink_to(entry, target_is_directory=True)
    program = [f"tinker_cookbook.recipes.{recipe.run[0]}"]
    program = [str(options.sources.resolve() / recipe.run[0])] if is_script else ["-m", *program]
    command = [str(options.python.absolute()), *PREFIXES[options.client], *program, *recipe.run[1:]]
    environment = {**_environment(place, options), **variables}
    output, metrics = place / "output.txt", place / recipe.metrics
    ends_s = time.monotonic() + options.timeout
    with output.open("wb") as log:
        start = partial(
            subprocess.Popen, command, cwd=place, env=environment, stdout=log, stderr=log
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
    assert not code, f"ended with {code}; see {output}"
    return recipe.check(read_metrics(metrics), output.read_text(errors="replace"))


def _environment(place: Path, options: argparse.Namespace) -> Mapping[str, str]:
    """Offline, with everything that a recipe leaves below its own folder."""
    paths = [options.cookbook, CLIENT_FOLDER if options.client == "tinsmith" else options.sdk]
    return {
        **{name: value for name, value in os.environ.items() if name != "TINSMITH_ADDRESS"},
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
        "HOME": str(place),
        "PYTHONPATH": os.pathsep.join(str(path.resolve()) for path in paths),
        "TINKER_API_KEY": os.environ.get("TINKER_API_KEY", "tml-local"),
        "TINKER_COOKBOOK_RUNS_DIR": str(place / "runs"),
    }


if __name__ == "__main__":
    sys.exit(main())
