"""Where settings come from: a file, the environment, the command line."""

import argparse
import functools
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    SettingsError,
    TomlConfigSettingsSource,
)

from tinsmithd.config.errors import ConfigError, is_near, nearest

SECTION_NAMES = ("training", "trainer", "sampler", "checkpoint", "gateway")
FILE_VARIABLE = "TINSMITH_CONFIG"
_NO_TEXT = "\0"
"""No argument can hold it: `null` is a text as any other."""


@dataclass(frozen=True)
class Given:
    """A value that somebody gave.

    Attributes:
        value: As it was given; a text where it comes from the environment or the command line.
        origin: Says from where: `FILE:LINE`, the name of a variable, a flag.
    """

    value: object
    origin: Callable[[], str]


def read(
    kind: type[BaseSettings], section: str, argv: Sequence[str] | None, env: Mapping[str, str]
) -> dict[str, Given]:
    """What is given for the settings of one process, by their keys.

    Args:
        kind: Its settings.
        section: Its section.
        argv: Command line without the program name; None means `sys.argv[1:]`.
        env: Environment.

    Raises:
        ConfigError: A key, section, variable or flag is unknown, or the file cannot be read.
    """
    flags, file = _flags(kind, section, argv)
    given: dict[str, Given] = {}
    file = file or env.get(FILE_VARIABLE)
    if file:
        values = _File(kind, section, Path(file))()
        for key, value in values.items():
            given[key] = Given(value, functools.partial(_place, Path(file), section, key))
    prefix = _prefix(section)
    try:
        values = _Environment(kind, section, env)()
    except SettingsError as error:
        raise ConfigError(f"{prefix}...: a table is written as JSON; {error}") from None
    for key, value in values.items():
        given[key] = Given(value, functools.partial(str, prefix + key.upper()))
    for key, value in flags.items():
        given[key] = Given(value, functools.partial(str, _flag(key)))
    return given


def _prefix(section: str) -> str:
    return f"TINSMITH_{section.upper()}_"


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


# --- the command line -----------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _flags(
    kind: type[BaseSettings], section: str, argv: Sequence[str] | None
) -> tuple[dict[str, Any], str | None]:
    """The settings that flags give, and the file that a flag names."""
    parser = _Parser(
        prog=f"python -m tinsmithd.{section}",
        description=kind.__doc__,
        allow_abbrev=False,  # a part of a key is a typo, too
    )
    parser.add_argument("--config", metavar="FILE", help=f"TOML file; else {FILE_VARIABLE}")
    source = CliSettingsSource[Any](
        kind, root_parser=parser, cli_kebab_case=True, cli_parse_none_str=_NO_TEXT
    )
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].partition("=")[0]
        key = flag.removeprefix("--").replace("-", "_")
        raise ConfigError(
            f"{flag}: unknown flag; {nearest(key, ['config', *kind.model_fields], _flag)}"
        )
    file: str | None = vars(args).pop("config")
    try:
        source(parsed_args=args)
        return source(), file
    except SettingsError as error:
        raise ConfigError(f"a table is given as --key NAME=VALUE; {error}") from None


# --- the environment ------------------------------------------------------------------------------


class _Environment(EnvSettingsSource):
    """The variables of one section, of an environment that need not be this process's."""

    def __init__(self, kind: type[BaseSettings], section: str, env: Mapping[str, str]) -> None:
        prefix = _prefix(section)
        self._ours = {name: text for name, text in env.items() if name.startswith(prefix)}
        for name in self._ours:
            key = name.removeprefix(prefix).lower()
            if key not in kind.model_fields:
                near = nearest(key, kind.model_fields, lambda known: prefix + known.upper())
                raise ConfigError(f"{name}: unknown key; {near}")
        _refuse_near_sections(env, section, kind)
        super().__init__(kind, env_prefix=prefix)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return {name.lower(): text for name, text in self._ours.items()}


def _refuse_near_sections(env: Mapping[str, str], section: str, kind: type[BaseSettings]) -> None:
    """Refuse `TINSMITH_TRANING_MODELS_MAX`: a known key behind a name that is no section's."""
    sections = tuple(map(_prefix, SECTION_NAMES))
    for name in env:
        if not name.startswith("TINSMITH_") or name.startswith(sections):
            continue
        for key in map(str.upper, kind.model_fields):
            said = name.removeprefix("TINSMITH_").removesuffix(f"_{key}")
            if name.endswith(f"_{key}") and is_near(said, section.upper()):
                raise ConfigError(f"{name}: unknown section; did you mean {_prefix(section)}{key}?")


# --- the file -------------------------------------------------------------------------------------


class _File(TomlConfigSettingsSource):
    """One section of a TOML file."""

    def __init__(self, kind: type[BaseSettings], section: str, file: Path) -> None:
        if not file.is_file():
            raise ConfigError(f"{file}: is no file")
        self._section = section
        self._known = kind.model_fields
        super().__init__(kind, file)

    def _read_file(self, file_path: Any) -> dict[str, Any]:
        try:
            document = super()._read_file(file_path)
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file_path}: {error}") from error
        for name, section in document.items():
            if name not in SECTION_NAMES:
                raise ConfigError(
                    f"{file_path}: unknown section [{name}]; {nearest(name, SECTION_NAMES)}"
                )
            if not isinstance(section, dict):
                raise ConfigError(f"{file_path}: {name} must be a section, [{name}]")
        values: dict[str, Any] = document.get(self._section, {})
        for key in values:
            if key not in self._known:
                place = _place(file_path, self._section, key)
                named = f"unknown key {self._section}.{key}"
                raise ConfigError(f"{place}: {named}; {nearest(key, self._known)}")
        return values


def _place(file: Path, section: str, key: str) -> str:
    """Where a file sets a key, as `FILE:LINE`; the file alone where that cannot be said."""
    try:
        lines = file.read_text().split("\n")
    except (OSError, UnicodeDecodeError):  # it has changed since it was loaded
        return str(file)
    for number, line in enumerate(lines, 1):
        if key not in line:
            continue
        try:
            document = tomllib.loads("\n".join(lines[:number]))
        except tomllib.TOMLDecodeError:  # a text goes on in the next line
            continue
        if key in document.get(section, {}):
            return f"{file}:{number}"
    return str(file)
