"""How many ranks a machine can have, found out without a library that would touch its devices."""

import re
from pathlib import Path


def devices(folder: Path = Path("/dev")) -> int:
    """Number of NVIDIA GPUs that this process was given, and 1 where there is none.

    Args:
        folder: Where device files are. A container has those of its own GPUs alone.
    """
    found = [file for file in folder.glob("nvidia*") if re.fullmatch(r"nvidia\d+", file.name)]
    return max(1, len(found))
