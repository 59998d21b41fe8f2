"""How much memory the control groups of this process leave it, of version 1 and of version 2."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class _Files:
    """What a version calls its files, and the pages in `stat` that the kernel drops first."""

    limit: str
    used: str
    droppable: str


_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Files("memory.max", "memory.current", "inactive_file")


def free_bytes(
    membership: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Bytes that this process may still take before a control group's limit stops it.

    Pages of files that nobody used lately, such as those of a model that was just read, count as
    free: the kernel drops them before it ends anybody. The kubelet counts so, too.

    Args:
        membership: Says which groups this process is in.
        mounted: Where the groups are mounted.

    Returns:
        None where no group says anything.
    """
    said = [_free(group, files) for group, files in _groups(membership, mounted)]
    found = [free for free in said if free is not None]
    return max(0, min(found)) if found else None


def _groups(membership: Path, mounted: Path) -> Iterator[tuple[Path, _Files]]:
    """The groups of this process, each with those that it is in, as far as they are visible."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, files = mounted, _V2
        elif "memory" in controllers.split(","):
            root, files = mounted / "memory", _V1
        else:
            continue
        # In a container the path may be the host's, of which only the last part is mounted, here.
        group = root / path.lstrip("/")
        for each in (group, *group.parents):
            yield each, files
            if each == root:
                break


def _free(group: Path, files: _Files) -> int | None:
    """What a group leaves; None where it says nothing or has no limit."""
    try:
        limit = (group / files.limit).read_text().strip()
        used = int((group / files.used).read_text())
        stat = (group / "memory.stat").read_text()
    except OSError:
        return None
    if limit == "max":
        return None
    pages = dict(line.split(" ", 1) for line in stat.splitlines())
    return int(limit) - used + int(pages.get(files.droppable, 0))
