"""The machine, the table, `bench.json` and `bench.png`."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from bench.harness import Result

COLOURS = {"met": "#2e7d32", "missed": "#c0392b", "FAILED": "#000000", "-": "#607d8b"}
HEADINGS = ("row", "what", "value", "95 % interval", "target", "met?", "sides apart")


def machine(threads: int, pairs: int) -> dict[str, str]:
    """What figures depend on."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": model,
        "cores": str(os.cpu_count()),
        "threads": str(threads),
        "pairs": str(pairs),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def _commit() -> str:
    """This tree's commit, marked where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=9"]
    folder = Path(__file__).parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def machine_line(values: Mapping[str, str]) -> str:
    """The machine in one line."""
    return " | ".join(f"{name} {value}" for name, value in values.items())


def verdict(result: Result) -> str:
    """One word: a key of `COLOURS`."""
    if result.failed:
        return "FAILED"
    return {True: "met", False: "missed", None: "-"}[result.met]


def table(results: Sequence[Result]) -> str:
    """Results as aligned columns."""
    rows = [HEADINGS, *(_cells(result) for result in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def remarks(results: Sequence[Result]) -> str:
    """Median times, and what else there is to say of the rows."""
    lines = []
    for result in results:
        times = [f"{k} {t.wall_s:.4f} ({t.cpu_s:.4f})" for k, t in result.sides.items()]
        said = [f"wall s (CPU s): {', '.join(times)}"] if times else []
        said += [result.notes] if result.notes else []
        if said:
            lines.append(f"row {result.row}, {result.what}: {'; '.join(said)}")
    return "\n".join(lines)


def _cells(result: Result) -> tuple[str, ...]:
    unit = f" {result.unit}" if result.unit else ""
    bound = ">=" if result.higher_is_better else "<="
    agreement = result.agreement
    return (
        result.row,
        result.what,
        f"{result.estimate.value:.3f}{unit}",
        f"{result.estimate.low:.3f} to {result.estimate.high:.3f}",
        "-" if result.target is None else f"{bound} {result.target:.2f}",
        verdict(result),
        "-"
        if agreement is None
        else f"logprobs {agreement.logprobs_abs:.0e}, gradients {agreement.gradients_rel:.0e}",
    )


def write_json(path: Path, values: Mapping[str, str], results: Sequence[Result]) -> None:
    """Everything, for programs."""
    rows = [{**asdict(result), "verdict": verdict(result)} for result in results]
    path.write_text(json.dumps({"machine": dict(values), "results": rows}, indent=2) + "\n")


def write_png(path: Path, values: Mapping[str, str], results: Sequence[Result]) -> None:
    """One bar per ratio with its interval, and a mark at each target; units other than ratios
    are in the table alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ratios = [result for result in results if not result.unit]
    if not ratios:
        return
    figure, axes = pyplot.subplots(figsize=(11, 1.6 + 0.42 * len(ratios)), layout="constrained")
    for place, result in enumerate(ratios):
        middle, low, high = result.estimate.value, result.estimate.low, result.estimate.high
        axes.barh(place, middle, color=COLOURS[verdict(result)], alpha=0.8, height=0.6)
        axes.errorbar(
            middle,
            place,
            xerr=[[max(middle - low, 0)], [max(high - middle, 0)]],
            color="black",
            capsize=3,
        )
        if result.target is not None:
            axes.plot([result.target] * 2, [place - 0.4, place + 0.4], color="#ff8f00", linewidth=3)
    axes.set_yticks(range(len(ratios)), [f"{r.row}  {r.what}" for r in ratios], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="grey", linewidth=1, linestyle="--")
    axes.set_xlabel(
        "ours / baseline (row 25: slope), 95 % interval; orange: target, lower is better"
    )
    figure.suptitle(machine_line(values), fontsize=6)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
