"""Writes `docs/settings.md` from the settings; `make settings` runs it."""

import inspect
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tinsmithd.config import SECTIONS, CalledConfig, Config, ServerConfig
from tinsmithd.config.fields import MIB, NUMBERS, bounds_of, default_of, kind_of
from tinsmithd.config.oidc import OidcSettings

WIDTH = 100
HEAD = """# Settings

<!-- Written by `make settings` from services/tinsmithd/config/. Do not edit. -->

A process takes each setting from, later ones winning:

1. its default, as below;
2. a TOML file, which `TINSMITH_CONFIG` or `--config FILE` names, with a section for each process:
   `[training]`, `[trainer]`, `[sampler]`, `[checkpoint]`, `[gateway]`;
3. the environment: `TINSMITH_<SECTION>_<SETTING>`, such as `TINSMITH_TRAINING_MODELS_MAX=16`;
4. the command line: `python -m tinsmithd.training --models-max 16`.

A key, variable or flag that is unknown, or a value that is not allowed, stops the process with exit
status 78 and a line that says which, where it stands and what is allowed. Settings do not change
while a process runs.

`tinsmith config` prints what is in force here and where each value comes from;
`tinsmith config training --models-max 16` does so for one process with its flags, `--json` for
programs. Secrets are not shown.

Names end in their unit: `_s` is seconds, `_bytes` bytes, `_tokens` tokens. `_max` is the most that
is allowed.
"""


def page() -> str:
    """The whole page, in Markdown."""
    parts = [HEAD]
    parts += _part("Every process", Config, "Each section has these.")
    parts += _part("Every process that is called", CalledConfig, _CALLED)
    parts += _part("Tokens of an issuer", OidcSettings, _CALLED)
    parts += _part("Every server", ServerConfig, _SERVERS)
    for section, kind in SECTIONS.items():
        parts += _part(f"`[{section}]`", kind, inspect.cleandoc(kind.__doc__ or ""))
    return "\n".join(parts)


_CALLED = "`[training]`, `[sampler]`, `[checkpoint]` and `[gateway]` have these."
_SERVERS = (
    "`[training]`, `[sampler]` and `[checkpoint]` have these; defaults of their own are there."
)


def _part(title: str, kind: type[BaseModel], about: str) -> Iterator[str]:
    yield f"## {title}\n\n{about}\n"
    own = inspect.get_annotations(kind)
    for key, field in kind.model_fields.items():
        if key in own:
            yield _entry(key, field)
    yield ""


def _entry(key: str, field: FieldInfo) -> str:
    facts = [_takes(field)]
    facts.append("must be set" if field.is_required() else f"default {_default(key, field)}")
    text = f"- **`{key}`** ({'; '.join(facts)}): {' '.join((field.description or '').split())}"
    return textwrap.fill(
        text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def _takes(field: FieldInfo) -> str:
    kind, bounds = kind_of(field), bounds_of(field)
    if field.is_required() or not bounds:
        return kind
    return f"{kind}, {bounds}" if kind in NUMBERS else bounds


def _default(key: str, field: FieldInfo) -> str:
    value = default_of(field)
    if value in ("", {}):
        return "empty"
    if "_bytes" in key and isinstance(value, int) and value and not value % MIB:
        mib = value // MIB
        return f"`{value}`, {mib // 1024} GiB" if not mib % 1024 else f"`{value}`, {mib} MiB"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def main() -> None:
    """Write the page to the file that is named."""
    Path(sys.argv[1]).write_text(page())


if __name__ == "__main__":
    main()
