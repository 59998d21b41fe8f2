"""What a check finds."""

from dataclasses import asdict, dataclass
from typing import Any

OK, WARNING, WRONG, SKIPPED = "ok", "warning", "wrong", "skipped"


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: What was looked at, in a word or two.
        state: `OK`, `WARNING`, `WRONG` or `SKIPPED`.
        found: What is so, in a sentence without an end.
        hint: What to do about it; empty where nothing is to be done.
    """

    check: str
    state: str
    found: str
    hint: str = ""

    def record(self) -> dict[str, Any]:
        """As `--json` has it."""
        return asdict(self)
