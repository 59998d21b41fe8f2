"""`tinsmith config`: every setting that is in force, its default, and where it comes from.

Reads the file that `--config` or `TINSMITH_CONFIG` names, the environment, and the flags that stand
behind a section's name, as that process would. Says on standard error what would stop a process,
and then ends with status 1. Secrets are not shown.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from tinsmithd.config import SECTIONS, Config, ConfigError
from tinsmithd.config.fields import default_of, is_secret
from tinsmithd.config.sources import FILE_VARIABLE, Given
from tinsmithd.text import bounded

CHARACTERS_MAX = 200
"""Longest value that a line shows."""


@dataclass(frozen=True)
class Row:
    """One setting as it is in force.

    Attributes:
        value: Its value; None where it must be set and is not.
        default: Its default; None where it has none.
        origin: "default", `FILE:LINE`, the name of a variable, a flag; "nowhere" where it must be
            set and is not.
        description: What it means.
    """

    value: object
    default: object
    origin: str
    description: str


def rows(kind: type[Config], argv: Sequence[str], env: Mapping[str, str]) -> dict[str, Row]:
    """The settings of one process by their keys.

    Args:
        kind: Which.
        argv: Its command line without the program name.
        env: Its environment.

    Raises:
        ConfigError: A setting would stop the process. One that is not set, and must be, does not
            count.
    """
    given = kind.given(argv, env)
    config: Config | None = None
    try:
        config = kind(_given=given)
    except ConfigError as error:
        if not error.unset:
            raise
    return {key: _row(key, field, given, config) for key, field in kind.model_fields.items()}


def _row(key: str, field: FieldInfo, given: Mapping[str, Given], config: Config | None) -> Row:
    default = None if field.is_required() else default_of(field)
    value = default if config is None else getattr(config, key)
    if config is None and key in given and not field.is_required():
        value = given[key].value
    if is_secret(field):
        value = str(value if isinstance(value, SecretStr) else SecretStr(str(value)))
    origin = given[key].origin() if key in given else "default"
    if value is None and origin == "default":
        origin = "nowhere"
    description = " ".join((field.description or "").split())
    return Row(value, default, origin, description)


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="tinsmith config",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help=f"TOML file; else {FILE_VARIABLE}")
    parser.add_argument("--json", action="store_true", help="print JSON, with what each means")
    parser.add_argument(
        "section", nargs="?", choices=list(SECTIONS), help="of this process alone, with its flags"
    )
    options, flags = parser.parse_known_args(argv)
    if flags and options.section is None:
        parser.error(f"{flags[0]}: whose? Name a section: {', '.join(SECTIONS)}")
    return options, flags


def _shown(value: object) -> str:
    if value is None:
        return "(must be set)"
    return json.dumps(value) if not isinstance(value, str) else bounded(value, CHARACTERS_MAX)


def _print_text(found: Mapping[str, Mapping[str, Row]]) -> None:
    for section, settings in found.items():
        print(f"[{section}]")
        width = max(map(len, settings))
        shown = {key: _shown(row.value) for key, row in settings.items()}
        value_width = min(40, max(map(len, shown.values())))
        for key, row in settings.items():
            origin = row.origin
            if origin != "default" and row.default is not None:
                origin += f" (default {_shown(row.default) or 'empty'})"
            print(f"  {key:<{width}}  {shown[key] or '(empty)':<{value_width}}  {origin}")
        print()


def main(argv: Sequence[str] | None = None) -> None:
    """Run `tinsmith config`.

    Args:
        argv: What follows `config`; None means `sys.argv[1:]`.
    """
    options, flags = _parse(argv)
    env = dict(os.environ)
    if options.config is not None:
        env[FILE_VARIABLE] = options.config
    found: dict[str, dict[str, Row]] = {}
    problems: list[str] = []
    for section in [options.section] if options.section else SECTIONS:
        try:
            found[section] = rows(SECTIONS[section], flags, env)
        except ConfigError as error:
            problems.append(str(error))
            continue
        unset = [key for key, row in found[section].items() if row.value is None]
        if options.section:  # asked for one; of all of them some are not meant to run here
            problems += [f"{section}.{key}: must be set" for key in unset]
    if options.json:
        document: dict[str, Any] = {
            section: {key: vars(row) for key, row in settings.items()}
            for section, settings in found.items()
        }
        print(json.dumps(document, indent=2))
    else:
        _print_text(found)
    for problem in problems:
        print(f"tinsmith: {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
