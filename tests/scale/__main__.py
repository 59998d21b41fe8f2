"""`python -m scale [ROW ...]`: how much one server carries; see the package."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from scale import report, rows_calls, rows_rest, rows_simulated
from scale.report import Figure
from scale.sizes import Sizes

ROWS: dict[str, Callable[[Sizes], Iterator[Figure]]] = {
    "models": rows_rest.models,
    "checkpoints": rows_rest.checkpoints,
    "calls": rows_calls.calls,
    "simulated": rows_simulated.simulated,
    "fairness": rows_calls.fairness,
    "limits": rows_calls.limits,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and save; a target that is missed is reported and is no failure."""
    parser = argparse.ArgumentParser(prog="scale", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; all if none")
    parser.add_argument("--out", type=Path, default=Path("scale-out"), help="folder for results")
    for field in dataclasses.fields(Sizes):
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=type(field.default), default=field.default)
    given = vars(parser.parse_args(argv))
    rows, out = given.pop("rows") or list(ROWS), given.pop("out")
    for row in rows:
        if row not in ROWS:
            parser.error(f"no row {row!r}; there are {', '.join(ROWS)}")
    sizes = Sizes(**given)
    values = report.machine()
    print(values, flush=True)
    figures: list[Figure] = []
    for row in rows:
        for figure in ROWS[row](sizes):
            figures.append(figure)
            print(report.table([figure]).splitlines()[1], file=sys.stderr, flush=True)
        report.write(out, values, figures)
    print(report.table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
