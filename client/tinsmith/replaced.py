"""Whether files were replaced since somebody looked at them."""

import os
from collections.abc import Iterable


def state_of(names: Iterable[str]) -> tuple[object, ...]:
    """Changes whenever one of the files does, or what a link to it leads to.

    Args:
        names: The files; empty names and files that are not there count as well.
    """
    found: list[object] = []
    for name in names:
        try:
            seen = os.stat(name) if name else None
        except OSError as error:
            found.append(error.errno)
            continue
        if seen is not None:
            found += (seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)
    return tuple(found)
