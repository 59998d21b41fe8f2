"""How long folders and tests took, of the timings that pytest left."""

import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

SLOWEST = 20


def timings_of(timings: Path) -> Mapping[str, float]:
    """Seconds of each test, by `folder/file::name`, with what it set up.

    Args:
        timings: What `--junitxml` wrote; a file that is not there has no tests.
    """
    found: Counter[str] = Counter()
    if timings.exists():
        for case in ElementTree.parse(timings).iter("testcase"):
            if "classname" not in case.attrib:
                continue  # the run was ended before the test was
            file = case.attrib["classname"].removeprefix("tests.").replace(".", "/")
            found[f"{file}::{case.attrib['name']}"] += float(case.attrib["time"])
    return found


def lines_of(
    stages: Mapping[str, float], tests: Mapping[str, float], budgets: Mapping[str, float]
) -> Sequence[str]:
    """The report.

    Args:
        stages: Seconds of each stage by the clock, by name.
        tests: Seconds of each test.
        budgets: Seconds that the tests of each folder may take.
    """
    folders: Counter[str] = Counter()
    for name, seconds in tests.items():
        folders[name.partition("/")[0]] += seconds
    lines = [f"{seconds:7.1f} s  {name}" for name, seconds in stages.items()]
    lines += ["", "Folders of tests, and their budgets:"]
    for name, seconds in folders.items():
        budget = budgets.get(name)
        of = "no budget" if budget is None else f"of {budget:g} s"
        lines.append(f"{seconds:7.1f} s  {name} ({of})")
    lines += ["", f"The {SLOWEST} slowest tests:"]
    slowest = sorted(tests.items(), key=lambda item: -item[1])[:SLOWEST]
    lines += [f"{seconds:7.1f} s  {name}" for name, seconds in slowest]
    over = [name for name, seconds in folders.items() if seconds > budgets.get(name, seconds)]
    lines += [f"WARNING: tests/{name} took longer than its budget" for name in over]
    return lines
