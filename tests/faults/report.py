"""What the kill harness counts, and the table that it prints."""

import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TextIO


@dataclass(frozen=True)
class Outcome:
    """What a script left: its log, and the files that it saved at the end."""

    lines: Sequence[str]
    files: Mapping[str, bytes]
    steps: int


@dataclass
class Report:
    """What happened."""

    killed: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    recovery_s: list[float] = field(default_factory=list)
    rounds: int = 0
    scripts: int = 0
    steps: int = 0
    values: int = 0
    lost: int = 0
    twice: int = 0
    differences: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """All of them."""
        return sum(self.killed.values())

    def print(self, file: TextIO = sys.stdout) -> None:
        """Write the table."""
        rows: list[tuple[str, object]] = [
            (f"killed: {k}", n) for k, n in sorted(self.killed.items())
        ]
        rows += [(f"failpoint not reached: {k}", n) for k, n in sorted(self.missed.items())]
        rows += [("kills", self.kills), ("recoveries", len(self.recovery_s))]
        if self.recovery_s:
            rows.append(("kill to serving, median, s", f"{statistics.median(self.recovery_s):.2f}"))
            rows.append(("kill to serving, most, s", f"{max(self.recovery_s):.2f}"))
        rows += [
            ("scripts that ran to their end", self.scripts),
            ("steps acknowledged", self.steps),
            ("values compared", self.values),
            ("acknowledged steps lost", self.lost),
            ("steps done twice", self.twice),
            ("mismatching values and files", len(self.differences)),
        ]
        for name, value in rows:
            print(f"{name:<44}{value:>10}", file=file)
        for difference in self.differences[:20]:
            print(difference, file=file)

    def compare(self, where: str, found: Outcome, twin: Outcome, steps: int) -> None:
        """Take in what a script left; `twin` is what it should have left, after so many steps."""
        self.scripts += 1
        self.values += len(found.lines)
        self.steps += sum(line.startswith("optim_step") for line in found.lines)
        self.lost += max(steps - found.steps, 0)
        self.twice += max(found.steps - steps, 0)
        if len(found.lines) != len(twin.lines):
            self.differences.append(f"{where}: {len(found.lines)} values, not {len(twin.lines)}")
        for number, (line, right) in enumerate(zip(found.lines, twin.lines, strict=False), 1):
            if line != right:
                self.differences.append(f"{where}:{number}: {line[:100]} is not {right[:100]}")
        for name, content in twin.files.items():
            if found.files[name] != content:
                self.differences.append(f"{where}: {name} differs")
