"""`tinsmith checkpoints`: what was saved."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tinsmith._download import download as download_folder
from tinsmith._download import export as export_archive
from tinsmith.cli.command import NEVER, Session, Yes, command, time_to_live
from tinsmith.cli.complete import checkpoint_paths, model_ids
from tinsmith.cli.failures import STATE, Failed
from tinsmith.cli.output import Cell, word
from tinsmith.cli.records import Record, checkpoint_record, tuning_text
from tinsmith.cli.text import counted, now, since, size
from tinsmith.v1 import checkpoint_service_pb2 as pb
from tinsmith.v1 import types_pb2

app = typer.Typer(help="Checkpoints: list, look at, fetch, copy, delete.", rich_markup_mode=None)

LIST_MAX = 1_000_000
_HELP = "tinsmith://MODEL/weights/NAME or tinsmith://MODEL/sampler_weights/NAME."
Checkpoint = Annotated[
    str, typer.Argument(metavar="PATH", help=_HELP, autocompletion=checkpoint_paths)
]
Checkpoints = Annotated[
    list[str], typer.Argument(metavar="PATH...", help=_HELP, autocompletion=checkpoint_paths)
]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there.")]


class Kind(StrEnum):
    """What a checkpoint is for."""

    training = "training"
    sampler = "sampler"


@command(app, "ls")
def ls(
    session: Session,
    model: Annotated[
        str,
        typer.Option(metavar="MODEL", help="Only those of this model.", autocompletion=model_ids),
    ] = "",
    kind: Annotated[Kind | None, typer.Option(help="Only this kind.")] = None,
    limit: Annotated[
        int, typer.Option(metavar="N", min=1, max=LIST_MAX, help="The newest N.")
    ] = 100,
) -> None:
    """List checkpoints, newest first."""
    request = pb.ListCheckpointsRequest(model_id=model)
    if kind is not None:
        request.kind = types_pb2.CheckpointKind.Value(f"CHECKPOINT_KIND_{kind.upper()}")
    found = session.access.pages(request, "checkpoints", limit)
    records = [checkpoint_record(checkpoint) for checkpoint in found]
    if session.out.as_json:
        session.out.json({"checkpoints": records})
        return
    columns = ("CHECKPOINT", "KIND", "TUNING", "STEPS", "SIZE", "SAVED", "EXPIRES")
    session.out.table(columns, [_row(record) for record in records])
    session.out.note(counted(len(records), "checkpoint"))


def _row(record: Record) -> list[Cell]:
    expires = since(record["expire_time"], now())
    return [
        record["checkpoint_path"],
        word(record["kind"]),
        tuning_text(record["tuning"]),
        record["step_count"],
        size(record["size_bytes"]),
        since(record["create_time"], now()),
        "unless used" if record["ephemeral"] else expires or NEVER,
    ]


@command(app, "show")
def show(session: Session, path: Checkpoint) -> None:
    """Show all that is known of a checkpoint, and its files."""
    record = _known(session, path)
    if session.out.as_json:
        session.out.json(record)
        return
    session.out.pairs(_facts(record))
    session.out.console.print()
    files = [[file["name"], size(file["size_bytes"]), file["sha256"]] for file in record["files"]]
    session.out.table(("FILE", "SIZE", "SHA-256"), files)


def _known(session: Session, path: str) -> Record:
    request = pb.GetCheckpointRequest(checkpoint_path=path)
    return checkpoint_record(session.access.ask(request).checkpoint)


def _facts(record: Record) -> list[tuple[str, Cell]]:
    tuning = {key: value for key, value in record["tuning"].items() if key != "kind"}
    return [
        ("Checkpoint", record["checkpoint_path"]),
        ("Kind", word(record["kind"])),
        ("Model", record["model_id"]),
        ("Owner", record["owner"]),
        ("Base model", record["base_model"]),
        ("Tuning", record["tuning"]["kind"]),
        *((f"  {key}", str(value)) for key, value in tuning.items()),
        ("Steps", record["step_count"]),
        ("Size", size(record["size_bytes"])),
        ("Digest", record["digest"]),
        ("Saved", record["create_time"] or ""),
        ("Expires", record["expire_time"] or ("unless used" if record["ephemeral"] else NEVER)),
        *((f"  {key}", value) for key, value in record["user_metadata"].items()),
    ]


@command(app, "download")
def download(
    session: Session,
    path: Checkpoint,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to; it is made.")],
) -> None:
    """Download a checkpoint as a folder that PEFT or transformers reads.

    Files of the same names in the folder are replaced, once all of them are there.
    """
    with session.out.progress("downloading") as progress:
        session.access.follow(download_folder(session.access.connection, path, folder, progress))
    if session.out.as_json:
        session.out.json({"checkpoint_path": path, "folder": str(folder)})
    else:
        session.out.line(str(folder))


@command(app, "export")
def export(
    session: Session,
    path: Checkpoint,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to: a new file.")],
    force: Force = False,
) -> None:
    """Write a checkpoint to one tar file: a folder for PEFT, or for transformers.

    Equal checkpoints give equal files. The file is there once it is whole.
    """
    if file.exists() and not force:
        raise Failed(f"{file} is there already", "--force replaces it", STATE)
    written = _written(session, path, file)
    if session.out.as_json:
        session.out.json({"checkpoint_path": path, "file": str(file), "size_bytes": written})
    else:
        session.out.line(str(file))


def _written(session: Session, path: str, file: Path) -> int:
    access = session.access
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as archive, session.out.progress("exporting") as progress:
            access.follow(export_archive(access.connection, path, archive, progress))
            written = archive.tell()
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    return written


@command(app, "rm")
def rm(session: Session, paths: Checkpoints, yes: Yes = False) -> None:
    """Delete checkpoints. Who reads one just now still gets all of it."""
    session.out.confirm(f"Delete {', '.join(paths)}, which cannot be undone?", yes=yes)
    deleted = []
    for path in paths:
        session.access.wait(session.access.rest.delete_checkpoint_from_tinker_path(path))
        deleted.append(path)
        session.out.note(f"deleted {path}")
    if session.out.as_json:
        session.out.json({"deleted": deleted})


@command(app, "ttl")
def ttl(
    session: Session,
    path: Checkpoint,
    lifetime: Annotated[
        str, typer.Argument(metavar="TIME", help="90s, 30m, 12h, 7d, 2w, or never.")
    ],
) -> None:
    """Let a checkpoint be deleted so long from now, or never."""
    seconds = time_to_live(lifetime)
    rest = session.access.rest
    session.access.wait(rest.set_checkpoint_ttl_from_tinker_path(path, seconds))
    _say_lifetime(session, path)


@command(app, "cp")
def cp(
    session: Session,
    path: Checkpoint,
    copy: Annotated[str, typer.Argument(metavar="COPY", help="Path of the copy.")],
    lifetime: Annotated[
        str, typer.Option("--ttl", metavar="TIME", help="Delete the copy so long from now.")
    ] = NEVER,
) -> None:
    """Copy a checkpoint to another name; its bytes are shared, each has its own lifetime."""
    seconds = time_to_live(lifetime)
    rest = session.access.rest
    made = rest.copy_weights(path, destination_path=copy, ttl_seconds=seconds)
    _say_lifetime(session, session.access.wait(made))


def _say_lifetime(session: Session, path: str) -> None:
    record = _known(session, path)
    if session.out.as_json:
        session.out.json(record)
        return
    expires = record["expire_time"]
    lives = f"until {expires} ({since(expires, now())})" if expires else "for ever"
    session.out.line(f"{record['checkpoint_path']} lives {lives}")
