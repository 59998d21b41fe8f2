"""What was measured, as a table and for programs."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        row: Which row of the program.
        at: At which point: how many models, calls a second, and so on.
        what: What was measured.
        value: In `unit`.
        target: What the value should be at most; None where there is none.
        notes: What else a reader must know.
    """

    row: str
    at: str
    what: str
    value: float
    unit: str
    target: float | None = None
    notes: str = ""

    @property
    def verdict(self) -> str:
        """One word."""
        return "-" if self.target is None else "met" if self.value <= self.target else "missed"


def percentiles(
    row: str, at: str, what: str, times_ms: Sequence[float], target_ms: float | None = None
) -> list[Figure]:
    """The middle of some times, and the 99th percentile; nothing where there are none."""
    if not times_ms:
        return []
    count = f"{len(times_ms)} calls, longest {max(times_ms):.1f} ms"
    return [
        Figure(row, at, f"{what} p50", float(np.percentile(times_ms, 50)), "ms"),
        Figure(row, at, f"{what} p99", float(np.percentile(times_ms, 99)), "ms", target_ms, count),
    ]


def machine() -> dict[str, str]:
    """What figures depend on."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=9"]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "load before": f"{os.getloadavg()[0]:.1f}",
        "commit": done.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def table(figures: Sequence[Figure]) -> str:
    """Figures as aligned columns."""
    rows = [("row", "at", "what", "value", "target", "met?", "notes")]
    for each in figures:
        target = "-" if each.target is None else f"<= {each.target:g}"
        value = f"{each.value:,.2f} {each.unit}"
        rows.append((each.row, each.at, each.what, value, target, each.verdict, each.notes))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def write(folder: Path, values: dict[str, str], figures: Sequence[Figure]) -> None:
    """All of it, as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{**asdict(each), "verdict": each.verdict} for each in figures]
    text = json.dumps({"machine": values, "figures": rows}, indent=1)
    (folder / "scale.json").write_text(text + "\n")
