"""`python -m sdk.methods FOLDER` calls every public method of every SDK under FOLDER, on a gateway.

It writes what came of them into `docs/tinker.md`, and fails where one neither works nor is refused
at once with a sentence.
"""

import argparse
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clusters import RunningCluster
from gateways import running_gateway
from sdk.__main__ import pythons_under, result_of, start
from tiny_models import write_tiny_model

PROGRAM = Path(__file__).with_name("method_program.py")
DOCUMENT = Path(__file__).parents[2] / "docs" / "tinker.md"
BEGIN, END = "<!-- methods: begin; `make sdk` writes them -->", "<!-- methods: end -->"
TWIN = "_async"
GOOD = ("works", "refused")
NONE = "-"
COLUMNS = 100
Found = Mapping[str, Mapping[str, Any]]
"""By the method's name, what came of it: `outcome`, `said` and `s`."""


def section(versions: Mapping[str, Found]) -> str:
    """The part of the document.

    Args:
        versions: What came of each SDK's methods, the newest SDK first.
    """
    names = sorted({_plain(name) for found in versions.values() for name in found})
    rows = []
    owner = ""
    for name in names:
        cls, _, method = name.partition(".")
        if cls != owner:
            rows.append([f"**{cls}**", *[""] * len(versions)])
            owner = cls
        rows.append([f"`{method}`", *(_cell(name, found) for found in versions.values())])
    parts = [*_counts(versions), "", *_table(["Method", *versions], rows), "", *_refusals(versions)]
    return "\n".join(parts)


def _plain(name: str) -> str:
    return name.removesuffix(TWIN)


def _cell(name: str, found: Found) -> str:
    """What came of a method, and of its twin where that is something else."""
    said = [found[each]["outcome"] for each in (name, name + TWIN) if each in found]
    return " / ".join(dict.fromkeys(said)) or NONE


def _counts(versions: Mapping[str, Found]) -> Iterator[str]:
    for version, found in versions.items():
        plain = Counter(each["outcome"] for name, each in found.items() if name == _plain(name))
        twins = Counter(each["outcome"] for name, each in found.items() if name != _plain(name))
        yield f"- {version}: {_share(plain, 'methods')}; {_share(twins, '`_async` twins')}."


def _share(counts: Counter[str], what: str) -> str:
    others = [f"{number} {name}" for name, number in counts.items() if name != "works"]
    return ", ".join([f"{counts['works']} of {counts.total()} {what} work", *others])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, ["-" * width for width in widths], *rows):
        yield "| " + " | ".join(map(str.ljust, row, widths)) + " |"


def _refusals(versions: Mapping[str, Found]) -> Iterator[str]:
    """Each sentence once, with the methods that it is the answer of."""
    methods: dict[str, dict[str, None]] = {}
    for found in versions.values():
        for name, each in found.items():
            if each["outcome"] == "refused":
                methods.setdefault(each["said"], {})[f"`{_plain(name)}`"] = None
    for said, names in methods.items():
        text = f"- {', '.join(names)}: {said}"
        yield from textwrap.wrap(
            text, COLUMNS, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )


def written(document: str, versions: Mapping[str, Found]) -> str:
    """A document with the section in its place."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{section(versions)}\n\n{END}{after}"


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="sdk.methods", description=__doc__)
    parser.add_argument("folder", type=Path)
    pythons = pythons_under(parser.parse_args().folder)
    versions: dict[str, Found] = {}
    with tempfile.TemporaryDirectory() as text:
        home = Path(text)
        base = write_tiny_model(home / "tiny-llama")
        with (
            RunningCluster(base, home / "cluster") as cluster,
            running_gateway(cluster.address, home / "gateway") as gateway,
        ):
            for version, python in pythons.items():
                program = start(python, gateway, home, PROGRAM)
                versions[version] = result_of(program)["methods"]
    bad = [
        f"{version}: {name}: {each['outcome']} after {each['s']:.1f} s: {each['said']}"
        for version, found in versions.items()
        for name, each in found.items()
        if each["outcome"] not in GOOD
    ]
    print("\n".join([*_counts(versions), *bad]))
    if not bad:
        DOCUMENT.write_text(written(DOCUMENT.read_text(), versions))
    sys.exit(len(bad))


if __name__ == "__main__":
    main()
