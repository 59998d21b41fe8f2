"""`tinsmith keys`: the file of keys that servers read, on the machine that has it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinsmith.cli.command import NEVER, Session, Yes, command, time_to_live
from tinsmith.cli.failures import Failed
from tinsmith.cli.output import Cell
from tinsmith.cli.text import now, since

if TYPE_CHECKING:
    from tinsmithd.keys import KeyFile, KeyRecord

app = typer.Typer(
    help="Keys of callers, in the servers' file: make, list, revoke.", rich_markup_mode=None
)

File = Annotated[
    Path, typer.Option(metavar="FILE", help="The file that keys_file of the servers names.")
]
DEFAULT_FILE = Path("keys.json")
BY_DEFAULT = "default"
"""In place of a limit's value: the setting's."""


class Scope(StrEnum):
    """What a key is for."""

    tenant = "tenant"
    read_only = "read-only"
    admin = "admin"
    server = "server"


@contextmanager
def _file(path: Path) -> "Iterator[KeyFile]":
    from tinsmithd.keys import KeyFile, KeyFileError

    try:
        yield KeyFile(path)
    except KeyFileError as error:
        raise Failed(str(error)) from error


@command(app, "create", asks=False)
def create(
    session: Session,
    tenant: Annotated[str, typer.Option(metavar="NAME", help="Whose it is.")] = "default",
    scope: Annotated[Scope, typer.Option(help="What it is for.")] = Scope.tenant,
    expires: Annotated[str, typer.Option(metavar="TIME", help="30d, 12h, ..., or never.")] = NEVER,
    note: Annotated[str, typer.Option(metavar="TEXT", help="What people shall know of it.")] = "",
    file: File = DEFAULT_FILE,
) -> None:
    """Make a key, and the file where there is none.

    The key is shown this once; the file has only what it takes to know it again. Servers take it
    within a second.
    """
    lifetime = time_to_live(expires)
    with _file(file) as keys:
        made = keys.create(tenant, scope, expires_in_s=lifetime, note=note)
    if session.out.as_json:
        session.out.json({"key": made.text} | _record(made.record))
        return
    session.out.line(made.text)
    session.out.note(
        f"{made.record.key_id}: {tenant}, {scope}; this is the only time that it is shown"
    )


@command(app, "ls", asks=False)
def ls(session: Session, file: File = DEFAULT_FILE) -> None:
    """List keys by their ids; the keys themselves are nowhere."""
    with _file(file) as keys:
        records = [_record(record) for record in keys.list()]
    if session.out.as_json:
        session.out.json({"keys": records})
        return
    session.out.table(
        ("KEY ID", "TENANT", "SCOPE", "MADE", "EXPIRES", "NOTE"), list(map(_row, records))
    )


def _record(record: "KeyRecord") -> dict[str, Any]:
    return {
        "key_id": record.key_id,
        "tenant": record.tenant,
        "scope": str(record.scope),
        "create_time": _moment(record.created_s),
        "expire_time": None if record.expires_s is None else _moment(record.expires_s),
        "note": record.note,
    }


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _row(record: Mapping[str, Any]) -> list[Cell]:
    expires = since(record["expire_time"], now())
    return [
        record["key_id"],
        record["tenant"],
        record["scope"],
        since(record["create_time"], now()),
        (expires, "red") if expires.endswith("ago") else expires or NEVER,
        record["note"],
    ]


@command(app, "revoke", asks=False)
def revoke(
    session: Session,
    key_ids: Annotated[list[str], typer.Argument(metavar="KEY_ID...", help="Of `keys ls`.")],
    file: File = DEFAULT_FILE,
    yes: Yes = False,
) -> None:
    """Take keys away: servers refuse them within a second. What was made with them stays."""
    session.out.confirm(f"Revoke {', '.join(key_ids)}, which cannot be undone?", yes=yes)
    revoked = []
    with _file(file) as keys:
        for key_id in key_ids:
            revoked.append(_record(keys.revoke(key_id)))
            session.out.note(f"revoked {key_id} of {revoked[-1]['tenant']}")
    if session.out.as_json:
        session.out.json({"revoked": revoked})


@command(app, "limit", asks=False)
def limit(
    session: Session,
    tenant: Annotated[str, typer.Argument(metavar="TENANT", help="Whose limits.")],
    values: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=VALUE...]", help=f"0 is none, {BY_DEFAULT} what the setting says."
        ),
    ] = None,
    file: File = DEFAULT_FILE,
) -> None:
    """Show the limits of a tenant that are not the settings', or change some.

    They are tenant_models_max, tenant_queued_bytes_max, tenant_tokens_per_minute_max,
    tenant_stored_bytes_max and tenant_samples_max.
    """
    wanted = dict(map(_limit, values or ()))
    with _file(file) as keys:
        kept = {} if wanted else keys.read().limits.get(tenant, {})
        found = keys.set_limits(tenant, wanted) if wanted else kept
    if session.out.as_json:
        session.out.json({"tenant": tenant, "limits": dict(found)})
        return
    session.out.table(("LIMIT", "VALUE"), [[name, value] for name, value in found.items()])
    if not found:
        session.out.note(f"{tenant} has the limits of the settings")


def _limit(text: str) -> tuple[str, int | None]:
    name, _, value = text.partition("=")
    if value == BY_DEFAULT:
        return name, None
    if not value.isdecimal() or len(value) > 18:
        raise typer.BadParameter(f"{text} is not NAME=VALUE with a whole number")
    return name, int(value)
