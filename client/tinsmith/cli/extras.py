"""What of an extra of this distribution is not installed."""

import importlib.metadata
import re


def missing_for(extra: str) -> list[str]:
    """Distributions of an extra, and of those that it names, that are not installed.

    Empty where this package is no installed distribution, which says what its extras are.
    """
    try:
        requirements = importlib.metadata.requires("tinsmith") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found: list[str] = []
    for requirement in requirements:
        named, _, marker = requirement.partition(";")
        if not re.search(rf"extra == ['\"]{extra}['\"]", marker):
            continue
        name, inner = re.fullmatch(r"\s*([\w.-]+)(?:\[([\w,.-]+)\])?.*", named).groups()  # type: ignore[union-attr]
        if name == "tinsmith":
            found += [lost for each in inner.split(",") for lost in missing_for(each.strip())]
        elif not _is_installed(name):
            found.append(name)
    return found


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
