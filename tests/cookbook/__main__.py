"""python -m cookbook: runs recipes, and writes a line for each. See the package's own words."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cookbook.folder import MODEL, write_folder
from cookbook.recipes import RECIPES
from cookbook.running import PREFIXES, Runner
from gateways import running_gateway


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
    runner = Runner(
        folder,
        {"TINSMITH_ADDRESS": address},
        options.python,
        options.cookbook,
        options.client,
        options.sdk if options.client == "sdk" else None,
        options.sources,
        options.timeout,
    )
    recipes = options.names or list(RECIPES)
    if options.client == "tinsmith":
        return _run_all(runner, recipes)
    names = json.dumps({MODEL: MODEL.rpartition("/")[2]})
    with running_gateway(address, folder / "gateway", base_models=names) as gateway:
        return _run_all(replace(runner, variables={"TINKER_BASE_URL": gateway.url}), recipes)


def _run_all(runner: Runner, recipes: Sequence[str]) -> int:
    failed = []
    for name in recipes:
        began_s = time.monotonic()
        try:
            found = runner.run(name)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            failed.append(name)
            found = f"FAILED: {error}"
        print(f"{name:<15}{time.monotonic() - began_s:6.0f} s  {found}", flush=True)
    print(f"{len(recipes) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
