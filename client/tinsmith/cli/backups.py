"""`tinsmith backup`: back-ups of the servers' folders, on the machine that has them."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinsmith.cli.command import Session, command
from tinsmith.cli.failures import Failed
from tinsmith.cli.text import size

if TYPE_CHECKING:
    from tinsmithd import backup

app = typer.Typer(
    help="Back-ups of a cluster's folders: make one while it runs, verify, restore.",
    rich_markup_mode=None,
)
PRIVATE = 0o077
"""What users sent and keys are in these files: they are for the user alone who runs this."""

Place = Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the back-up is.")]
Data = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="--data of `tinsmith up`: both of its folders."),
]
Training = Annotated[
    Path | None, typer.Option(metavar="DIR", help="data_folder of the Training server.")
]
Checkpoints = Annotated[
    Path | None, typer.Option(metavar="DIR", help="data_folder of the Checkpoint server.")
]
Keys = Annotated[Path | None, typer.Option(metavar="FILE", help="The file of keys.")]


@contextmanager
def _able() -> Iterator[None]:
    """Say what this command lacks, and what a back-up lacks, in a sentence."""
    try:
        from tinsmithd.backup import BackupError
        from tinsmithd.formats import FormatUnknown
    except ImportError as error:
        raise Failed(str(error), "pip install 'tinsmith[control]'") from error
    os.umask(PRIVATE)
    try:
        yield
    except (BackupError, FormatUnknown) as error:
        raise Failed(str(error)) from error


@contextmanager
def _shown(session: Session, what: str, total: int = 0) -> "Iterator[Callable[[int], None]]":
    with session.out.progress(what) as show:
        done = 0

        def add(count: int) -> None:
            nonlocal done
            done += count
            show(done, max(total, done))

        yield add


def _folders(
    data: Path | None, training: Path | None, checkpoints: Path | None
) -> tuple[Path | None, Path | None]:
    if data is not None:
        training, checkpoints = training or data / "training", checkpoints or data / "checkpoints"
    return training, checkpoints


@command(app, "create", asks=False)
def create(
    session: Session,
    place: Place,
    data: Data = None,
    training_folder: Training = None,
    checkpoint_folder: Checkpoints = None,
    keys: Keys = None,
) -> None:
    """Make a back-up while the cluster runs, or while it is stopped.

    It is of one moment: every model with all calls up to then, and every checkpoint. Where the
    servers have a machine each, make one on the Training server's first.
    """
    training, checkpoints = _folders(data, training_folder, checkpoint_folder)
    with _able():
        from tinsmithd import backup

        with _shown(session, "copying") as progress:
            made = backup.create(
                place, training=training, checkpoints=checkpoints, keys=keys, progress=progress
            )
    if session.out.as_json:
        session.out.json({"folder": str(place)} | vars(made))
        return
    session.out.line(
        f"{place} has {made.models} models, {made.snapshots} snapshots and "
        f"{made.checkpoint_files} files of checkpoints, {size(made.size_bytes)}"
    )
    for problem in made.problems:
        session.out.note(problem)


@command(app, "verify", asks=False)
def verify(session: Session, place: Place) -> None:
    """Read all of a back-up and hold it against its checksums."""
    with _able():
        from tinsmithd import backup

        with _shown(session, "reading") as progress:
            found = backup.verify(place, progress)
    record = _record(found.about) | {"problems": list(found.problems)}
    if session.out.as_json:
        session.out.json(record)
    if found.problems:
        first, *more = found.problems
        also = f", and {len(more)} more" if more else ""
        raise Failed(f"{place} is damaged: {first}{also}", "restore another one")
    if not session.out.as_json:
        total = size(sum(entry.size_bytes for entry in found.about.files))
        made = f"from {record['time']}, release {record['release']}"
        session.out.line(f"{place} is whole: {len(found.about.files)} files, {total}, {made}")


def _record(about: "backup.About") -> dict[str, object]:
    time = datetime.fromtimestamp(about.time_s, UTC).isoformat(timespec="seconds")
    size_bytes = sum(entry.size_bytes for entry in about.files)
    return {
        "time": time,
        "release": about.release,
        "parts": list(about.parts),
        "size_bytes": size_bytes,
    }


@command(app, "restore", asks=False)
def restore(
    session: Session,
    place: Place,
    data: Data = None,
    training_folder: Training = None,
    checkpoint_folder: Checkpoints = None,
    keys: Keys = None,
) -> None:
    """Put a back-up into new folders; every byte is checked. Start the servers after that.

    What came after the back-up is gone. Clients from before hear that (MODEL_RESTORED) and attach
    anew.
    """
    training, checkpoints = _folders(data, training_folder, checkpoint_folder)
    with _able():
        from tinsmithd import backup

        with _shown(session, "copying") as progress:
            found = backup.restore(
                place, training=training, checkpoints=checkpoints, keys=keys, progress=progress
            )
    time = datetime.fromtimestamp(found.time_s, UTC).isoformat(timespec="seconds")
    if session.out.as_json:
        session.out.json(
            {
                "time": time,
                "release": found.release,
                "models": found.models,
                "size_bytes": found.size_bytes,
            }
        )
        return
    session.out.line(
        f"restored {found.models} models, {size(found.size_bytes)}, as they were at {time}"
    )
